r"""A student that learns from a teacher: the loss of a batch, and the judgement of held-out ones.

Language models and classifiers are one case: a batch has inputs, labels, and a mask over the
labels; a network makes logits with the labels' leading axes.

    batch --> teacher: lesson (rows, features)
          \-> student: hidden, features --> head --> response losses, chunk by chunk
                                   \--> projections --> feature and relation losses
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill.arrays import divisor, to_host
from mlx_distill.distillation.comparison import compare
from mlx_distill.distillation.features import uniform_map
from mlx_distill.distillation.judgement import judge
from mlx_distill.distillation.learned import learned_rows
from mlx_distill.distillation.objective import response_losses
from mlx_distill.distillation.teachers import Answers, Lesson, Teacher
from mlx_distill.distillation.terms import PROJECTED, RESPONSE, LossTerm
from mlx_distill.errors import InputError
from mlx_distill.losses.chunked import chunk_rows, chunked_loss
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.taps import Layer, find_layer


@dataclass(frozen=True)
class Examples:
    """Examples of a classifier; also a batch of them.

    Args:
        inputs: One per example.
        labels: Their classes, (B,).
        mask: Weight of every example.
        rows: Which examples they are.
    """

    inputs: mx.array
    labels: mx.array
    mask: mx.array
    rows: list[int]

    @classmethod
    def of(cls, inputs: mx.array | np.ndarray, labels: mx.array | np.ndarray) -> "Examples":
        """Return examples of equal weight.

        Raises:
            InputError: If there are none, or the labels are no classes, one per example.
        """
        inputs, labels = _array("inputs", inputs), _array("labels", labels)
        if not inputs.ndim:
            raise InputError("inputs must be an array with an example per row, got one number")
        if labels.ndim != 1 or not mx.issubdtype(labels.dtype, mx.integer):
            raise InputError(
                f"labels must be the classes' numbers, one per example, got {labels.dtype} of "
                f"shape {labels.shape}"
            )
        if inputs.shape[0] != labels.shape[0]:
            raise InputError(f"{inputs.shape[0]} inputs do not fit {labels.shape[0]} labels")
        if labels.size == 0:
            raise InputError("there are no examples")
        return cls(inputs, labels, mx.ones(labels.shape), list(range(labels.shape[0])))

    def take(self, rows: Sequence[int]) -> "Examples":
        """Return some of the examples."""
        at = mx.array(list(rows), mx.int32)
        return Examples(self.inputs[at], self.labels[at], self.mask[at], list(rows))


@dataclass(frozen=True)
class Taught:
    """A batch and what the teacher says about it."""

    batch: Any
    lesson: Lesson

    @property
    def rows(self) -> list[int]:
        """Which rows of the data it is made of."""
        return self.batch.rows


class Trainee(nn.Module):
    """What is trained: the student, and projections that are never exported."""

    def __init__(self, student: nn.Module, projections: dict[str, nn.Module]):
        super().__init__()
        self.student = student
        self.projections = projections


def _array(name: str, values: Any) -> mx.array:
    """Return an array of MLX's; texts, for example, are none."""
    try:
        return mx.array(values)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be an array of numbers, got {values!r:.40}") from None


class Distiller:
    """A student, its teacher, and what is minimised.

    Args:
        student: Its trainable parameters are trained.
        teacher: Teaches.
        terms: The objective.
        batch: Any batch, from which widths are read.
        num_examples: Size of the training set; the contrastive loss asks for it.
        seed: Of the projections' first weights.

    Raises:
        InputError: If the networks do not fit each other, or a layer does not exist.

    Attributes:
        network: What to train.
        notes: What the user should know, in sentences.
        num_outputs: The student's tokens or classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        terms: Sequence[LossTerm],
        batch: Any,
        num_examples: int = 1,
        seed: int = 0,
    ):
        if not terms:
            raise InputError("there is no loss; name at least one")
        if not any(term.weight for term in terms):
            raise InputError("all losses have a weight of 0, so nothing would be learned")
        self.texts = batch.mask.ndim == 2
        self.teacher = teacher
        self.response = [term for term in terms if term.name in RESPONSE]
        self.others = [term for term in terms if term.name not in RESPONSE]
        self.num_examples = num_examples
        self.notes: list[str] = []
        self.answers = Answers(student, self.texts)
        self.names = _names([*self.response, *self.others])
        self.weights = [term.weight for term in (*self.response, *self.others)]
        first = _teaching_network(teacher)
        if any(answers.network is student for answers in getattr(teacher, "answers", ())):
            raise InputError("the student is its own teacher; load the network twice")
        if self.others and first is None:
            raise InputError(f"{self.others[0].name} compares features, so it needs a live teacher")
        self.pairs = {place: _pairs(term, student, first) for place, term in enumerate(self.others)}
        every = [pair for pairs in self.pairs.values() for pair in pairs]
        self.student_layers = list(dict.fromkeys(ours for ours, _ in every))
        self.teacher_layers = list(dict.fromkeys(theirs for _, theirs in every))
        self.network = Trainee(student, self._open(batch, seed))

    def teach(self, batch: Any) -> "Taught":
        """Return a batch and the teacher's lesson on it."""
        return Taught(batch, self.teacher.lesson(batch, self.teacher_layers))

    def loss(self, taught: "Taught") -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Return the objective's sum, the number of labels, and every term's mean."""
        batch, lesson = taught.batch, taught.lesson
        hidden, features = self.answers.read(batch.inputs, self.student_layers)
        count = batch.mask.sum()
        total, means = mx.array(0.0), []
        if self.response:
            total, sums = self._response(hidden, batch, lesson)
            means = [value / divisor(count) for value in sums]
        for place, term in enumerate(self.others):
            value, number = self._compare(place, term, features, lesson.features, batch)
            mean = value / divisor(number)
            total = total + term.weight * count * mean
            means.append(mx.stop_gradient(mean))
        return total, count, dict(zip(self.names, means, strict=True))

    def shares(self, parts: Mapping[str, Any]) -> dict[str, float]:
        """Return every term's share of the loss, its weight included; of those that have one.

        Args:
            parts: The terms' means, by name, as ``loss`` names them.
        """
        pairs = zip(self.names, self.weights, strict=True)
        values = {name: weight * abs(parts[name]) for name, weight in pairs if weight}
        total = sum(values.values()) or 1.0
        return {name: value / total for name, value in values.items()}

    def evaluate(self, batches: Iterable[Any], teacher: Teacher | None = None) -> dict[str, float]:
        """Return the student's held-out figures; ``teacher`` judges instead of its own."""
        student = self.network.student
        student.eval()
        try:
            return judge(self.answers, teacher or self.teacher, batches, self.texts)
        finally:
            student.train()

    def _response(
        self, hidden: mx.array, batch: Any, lesson: Lesson
    ) -> tuple[mx.array, list[mx.array]]:
        """Return the response losses' weighted sum, and each one's sum."""
        body, terms, num_rows = self.answers.body, self.response, len(lesson.rows)

        def on_rows(logits: mx.array, *given: mx.array) -> tuple[mx.array, mx.array]:
            labels, mask, rows = given[0], given[1], given[2:]
            goal = lesson.spell(*rows) if num_rows else None
            total, sums = response_losses(terms, logits, goal, labels, mask)
            return total, mx.stack(sums)

        labels, mask, hidden, *rows = learned_rows(batch, hidden, *lesson.rows)
        inputs = [labels, mask, *rows]
        if body is None:
            total, sums = on_rows(hidden, *inputs)
        else:
            size = chunk_rows(body.num_entries)
            total, sums = chunked_loss(body.head, hidden, on_rows, inputs, size)
        return total, list(sums)

    def _compare(
        self,
        place: int,
        term: LossTerm,
        features: dict[Layer, mx.array],
        goals: dict[Layer, mx.array],
        batch: Any,
    ) -> tuple[mx.array, mx.array]:
        """Return the sum and the count of a feature or relation loss over its pairs of layers."""
        projections = self.network.projections
        pairs = []
        for number, (ours, theirs) in enumerate(self.pairs[place]):
            project = projections.get(f"pair_{place}_{number}", lambda x: x)
            pairs.append((project(features[ours]), goals[theirs]))
        return compare(term, pairs, batch.mask, self.num_examples)

    def _open(self, batch: Any, seed: int) -> dict[str, nn.Module]:
        """Try a batch, check that widths fit, and return the projections."""
        hidden, features = self.answers.read(batch.inputs, self.student_layers)
        lesson = self.teacher.lesson(batch, self.teacher_layers)
        labels, mask, first, *rows = (
            array[:1] for array in learned_rows(batch, hidden, *lesson.rows)
        )
        logits = self.answers.logits(first)
        ours = logits.shape[-1]
        goal = lesson.spell(*rows) if rows else None
        if goal is not None:
            self._check_widths(ours, goal.logits)
        response_losses(self.response, logits, goal, labels, mask)  # a term may not know the goal
        self.num_outputs = ours
        if not self.texts:
            self.check_labels(batch)
        mx.random.seed(seed)
        projections: dict[str, nn.Module] = {}
        for place, term in enumerate(self.others):
            for number, (mine, their) in enumerate(self.pairs[place]):
                width, goal_width = features[mine].shape[-1], lesson.features[their].shape[-1]
                if term.name in PROJECTED and width != goal_width:
                    # Nothing that int() takes: a checkpoint would be read as lists.
                    projections[f"pair_{place}_{number}"] = nn.Linear(width, goal_width, bias=False)
        mx.eval([module.parameters() for module in projections.values()])
        return projections

    def check_labels(self, examples: Examples) -> None:
        """Raise InputError if a label is none of the student's classes."""
        labels = mx.where(examples.mask > 0, examples.labels, 0)  # others may hold -100
        low, high = to_host(mx.stack([labels.min(), labels.max()]))
        if low < 0 or high >= self.num_outputs:
            wrong = low if low < 0 else high
            raise InputError(f"a label is {wrong}, the student has {self.num_outputs} classes")

    def _check_widths(self, ours: int, goal: mx.array | None) -> None:
        theirs = ours if goal is None else goal.shape[-1]
        if theirs == ours or all(term.name in ("hard", "sorted_l1") for term in self.response):
            return
        if not self.texts:
            raise InputError(f"the teacher has {theirs} classes, the student {ours}")
        self.notes.append(
            f"the teacher's head has {theirs} entries, the student's {ours}: only the first "
            f"{min(ours, theirs)} are compared"
        )


def _pairs(term: LossTerm, student: nn.Module, teacher: Any) -> list[tuple[Layer, Layer]]:
    """Return the layers that a term compares."""
    pairs: list[tuple[Layer, Layer]]
    if not isinstance(term.layers, str):
        pairs = list(term.layers)
    else:
        counts = (len(numbered_layers(network)) for network in (student, teacher))
        pairs = [*uniform_map(*counts)]
        if term.layers == "last" and term.name != "flow_of_solution":
            pairs = pairs[-1:]
    for ours, theirs in pairs:
        find_layer(student, ours)
        find_layer(teacher, theirs)
    if term.name == "flow_of_solution" and len(pairs) < 2:
        raise InputError("flow_of_solution needs at least two pairs of layers")
    return pairs


def _teaching_network(teacher: Teacher) -> nn.Module | None:
    answers = getattr(teacher, "answers", None)
    return answers[0].network if answers else None


def _names(terms: Sequence[LossTerm]) -> list[str]:
    """Return the terms' names for the log; a second one of a name has a number."""
    names: list[str] = []
    for term in terms:
        number = 1 + sum(before.name == term.name for before in terms[: len(names)])
        names.append(term.name if number == 1 else f"{term.name}_{number}")
    return names
