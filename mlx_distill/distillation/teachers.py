"""Who teaches: live networks, one or several, or their answers on disk.

A teacher gives a ``Lesson`` per batch: rows from which its word on any position can be spelled out
later, a few tokens at a time, and the features that were asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill.compat import complete
from mlx_distill.data.alignment import OtherReading, read_otherwise
from mlx_distill.data.teacher_cache import TeacherCache
from mlx_distill.data.texts import Text
from mlx_distill.distillation.objective import Goal
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, OneOf, check_value
from mlx_distill.target.body import Body
from mlx_distill.target.context import position_limit
from mlx_distill.target.reading import read_whole
from mlx_distill.target.taps import Layer, tapped

MAX_READINGS = 100_000

TeacherWeights = tuple[Annotated[float, Between(above=0, high=10**6)], ...]
TeacherMean = Annotated[str, OneOf("probs", "logits")]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about a batch.

    Args:
        rows: Arrays whose leading axes are the labels'.
        spell: Makes the goal of some rows of ``rows``, (N, ...) each.
        features: Outputs of layers of the first teacher.
    """

    rows: tuple[mx.array, ...]
    spell: Callable[..., Goal]
    features: dict[Layer, mx.array] = field(default_factory=dict)


@runtime_checkable
class Teacher(Protocol):
    """Teaches."""

    def lesson(self, batch: Any, layers: Sequence[Layer] = ()) -> Lesson:
        """Return what the teacher says about a batch."""
        ...


class Answers:
    """A network's logits, made a few positions at a time where that is possible.

    Args:
        network: Called with a batch's inputs.
        texts: Whether it reads texts; only then a head is looked for.
    """

    def __init__(self, network: nn.Module, texts: bool):
        self.network = network
        self.texts = texts
        self.body = Body.of(network) if texts else None

    def read(
        self, inputs: mx.array, layers: Sequence[Layer] = ()
    ) -> tuple[mx.array, dict[Layer, mx.array]]:
        """Return the hidden states that ``logits`` makes logits of, and outputs of layers."""
        with tapped(self.network, layers) as features:
            hidden = self._read(inputs)
        return hidden, dict(features)

    def _read(self, inputs: mx.array) -> mx.array:
        if self.body:
            return self.body(inputs)
        return read_whole(self.network, inputs) if self.texts else self.network(inputs)

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the hidden states alone."""
        return self.read(inputs)[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of what ``read`` returned."""
        return self.body.head(hidden) if self.body else hidden


class LiveTeacher:
    """One network or several that teach while the student learns.

    Args:
        networks: The teachers; they are frozen and put in evaluation mode.
        texts: Whether they read texts.
        weights: Of each, in the mean; None for equal ones.
        mean: Of what several teachers' mean is taken: "probs" or "logits".

    Raises:
        InputError: If weights and teachers, or the teachers' classes, do not fit each other.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        texts: bool = True,
        weights: Sequence[float] | None = None,
        mean: str = "probs",
    ):
        if not networks:
            raise InputError("there is no teacher; name at least one")
        weights = [1.0] * len(networks) if weights is None else list(weights)
        if len(weights) != len(networks):
            raise InputError(f"{len(weights)} weights do not fit {len(networks)} teachers")
        check_value("teacher_weights", weights, TeacherWeights)
        check_value("teacher_mean", mean, TeacherMean)
        for network in networks:
            complete(network)
            network.freeze()
            network.eval()
        self.answers = [Answers(network, texts) for network in networks]
        self.weights = [weight / sum(weights) for weight in weights]
        self.mean = mean
        self.texts = texts

    def lesson(self, batch: Any, layers: Sequence[Layer] = ()) -> Lesson:
        """Return what the teachers say about a batch; features are the first one's."""
        rows, features = [], {}
        for place, answers in enumerate(self.answers):
            hidden, found = answers.read(batch.inputs, layers if place == 0 else ())
            rows.append(mx.stop_gradient(hidden))
            if place == 0:
                features = {layer: mx.stop_gradient(output) for layer, output in found.items()}
        return Lesson(tuple(rows), self._spell, features)

    def _spell(self, *rows: mx.array) -> Goal:
        every = [answers.logits(row) for answers, row in zip(self.answers, rows, strict=True)]
        widths = [logits.shape[-1] for logits in every]
        if not self.texts and len(set(widths)) > 1:  # texts' heads may be padded, classes never
            raise InputError(f"the teachers have {' and '.join(map(str, widths))} classes")
        return Goal(mean_logits(every, self.weights, self.mean))


def mean_logits(logits: Sequence[mx.array], weights: Sequence[float], mean: str) -> mx.array:
    """Return the logits of several networks' weighted mean.

    Args:
        logits: Of every network; where they differ in width, the shared part counts.
        weights: They sum to one.
        mean: "probs" mixes the distributions (the log of the mixture is returned), "logits" takes
            their geometric mean.
    """
    if len(logits) == 1:
        return logits[0]
    width = min(one.shape[-1] for one in logits)
    every = [one[..., :width].astype(mx.float32) for one in logits]
    if mean == "logits":
        return mx.stack([w * one for w, one in zip(weights, every, strict=True)]).sum(axis=0)
    log_probs = [
        one - mx.logsumexp(one, axis=-1, keepdims=True) + math.log(weight)
        for weight, one in zip(weights, every, strict=True)
    ]
    return mx.logsumexp(mx.stack(log_probs), axis=0)


class CachedTeacher:
    """A teacher whose top tokens lie on disk.

    Args:
        cache: Of the very texts that are learned, in their order.
        texts: These texts; how frequent tokens are in them is what the tail "prior" goes by.
    """

    def __init__(self, cache: TeacherCache, texts: Sequence[Text] = ()):
        self.cache = cache
        counts = np.full((cache.vocab_size,), 0.1)  # of tokens that are nowhere, too
        for text in texts:
            np.add.at(counts, text.tokens, 1)
        self.log_prior = mx.array(np.log(counts).astype(np.float32))

    def lesson(self, batch: Any, layers: Sequence[Layer] = ()) -> Lesson:
        """Return what the cache holds of a batch."""
        if layers:
            raise InputError("a cache holds no features; losses on features need a live teacher")
        ids, log_probs = self.cache.batch(batch.rows, batch.mask)
        size = self.cache.vocab_size
        prior = self.log_prior
        return Lesson((ids, log_probs), lambda a, b: Goal(None, a, b, size, log_prior=prior))


class TextTeacher:
    """A teacher of whom there is only text: nothing but the hard labels is known."""

    def lesson(self, batch: Any, layers: Sequence[Layer] = ()) -> Lesson:
        """Return nothing."""
        if layers:
            raise InputError("text alone holds no features; losses on features need a teacher")
        return Lesson((), lambda: Goal())


class RetokenizedTeacher(LiveTeacher):
    """A teacher with a tokenizer of its own: it reads the same text in its own tokens.

    It reads chats as its own template writes them. Where a token of the student and one of the
    teacher begin at the same character of an answer, their predictions are compared; only losses
    between sorted distributions make sense. Elsewhere the teacher says nothing and the loss is 0.

    Args:
        network: The teacher.
        student_tokenizer: Of the texts' tokens.
        tokenizer: The teacher's.
        template_config: Further arguments of the teacher's chat template.

    Source:
        Boizard et al. 2024 (universal logit distillation), arXiv:2402.12030, section 3, where the
        i-th tokens are compared, wherever they begin.
    """

    def __init__(
        self,
        network: nn.Module,
        student_tokenizer: Any,
        tokenizer: Any,
        template_config: Mapping[str, Any] | None = None,
    ):
        super().__init__([network])
        self.student_tokenizer = student_tokenizer
        self.tokenizer = tokenizer
        self.template_config = template_config
        self.limit = position_limit(network)
        self._readings: dict[tuple[int, ...], OtherReading] = {}

    def lesson(self, batch: Any, layers: Sequence[Layer] = ()) -> Lesson:
        """Return what the teacher says, in the places of the student's learned tokens."""
        if layers:
            raise InputError(
                "features of another tokenizer's tokens cannot be compared; use sorted_l1"
            )
        readings = [self._reading(text) for text in batch.texts]
        own = [reading.tokens[: self.limit] for reading in readings]
        width = max(map(len, own))
        inputs = mx.array([tokens + [0] * (width - len(tokens)) for tokens in own])
        hidden = self.answers[0].hidden(inputs)
        at, known = (np.zeros(batch.mask.shape, kind) for kind in (np.int32, np.float32))
        for row, reading in enumerate(readings):
            for place, their in reading.places:
                # What precedes a token predicts it; the first one has nothing before it.
                if 0 < place <= at.shape[-1] and 0 < their < len(own[row]):
                    at[row, place - 1], known[row, place - 1] = their - 1, 1
        rows = mx.take_along_axis(hidden, mx.array(at)[..., None], axis=1)
        known = mx.array(known) * batch.mask
        return Lesson((mx.stop_gradient(rows), known), self._spell_known)

    def _reading(self, text: Text) -> OtherReading:
        key = tuple(text.tokens)
        if key not in self._readings:
            if len(self._readings) == MAX_READINGS:  # a student may write new texts for ever
                self._readings.clear()
            self._readings[key] = read_otherwise(
                text, self.student_tokenizer, self.tokenizer, self.template_config
            )
        return self._readings[key]

    def _spell_known(self, hidden: mx.array, known: mx.array) -> Goal:
        return Goal(self.answers[0].logits(hidden), known=known)
