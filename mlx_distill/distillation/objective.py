"""The objective: any weighted sum of losses, named.

    forward_kl:weight=0.9,temperature=2  hard:weight=0.1  hidden_mse:layers=0-3/1-7

A term has a weight, the loss's own options, and, if it compares features, pairs of layers
(student-teacher). Response losses are summed over positions and divided once by their number;
feature and relation losses are means over a batch.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_distill.distillation.features import Layer
from mlx_distill.errors import InputError
from mlx_distill.losses import feature, relation, response

RESPONSE: dict[str, Callable[..., response.Loss]] = {
    "hard": response.hard_labels,
    "forward_kl": response.forward_kl,
    "reverse_kl": response.reverse_kl,
    "jensen_shannon": response.jensen_shannon,
    "skew_forward_kl": response.skew_forward_kl,
    "skew_reverse_kl": response.skew_reverse_kl,
    "total_variation": response.total_variation,
    "soft_cross_entropy": response.soft_cross_entropy,
    "logit_mse": response.logit_mse,
    "decoupled_kd": response.decoupled_kd,
    "sparse_kl": response.sparse_kl,
    "sorted_l1": response.sorted_l1,
}
FEATURE: dict[str, Callable[..., response.Loss]] = {
    "hidden_mse": feature.hidden_mse,
    "hidden_cosine": feature.hidden_cosine,
    "patient_kd": feature.patient_kd,
    "attention_transfer": feature.attention_transfer,
}
RELATION: dict[str, Callable[..., response.Loss]] = {
    "flow_of_solution": relation.flow_of_solution,
    "relational_distance": relation.relational_distance,
    "relational_angle": relation.relational_angle,
    "similarity_preserving": relation.similarity_preserving,
    "probabilistic_transfer": relation.probabilistic_transfer,
    "neuron_selectivity": relation.neuron_selectivity,
    "contrastive": relation.contrastive,
}
LOSSES = RESPONSE | FEATURE | RELATION
# Response losses that need no more of the teacher than its top tokens.
CACHED = {"hard", "sparse_kl"}
# Losses whose student features go through a learned projection where the widths differ.
PROJECTED = {"hidden_mse", "hidden_cosine", "patient_kd", "contrastive", "flow_of_solution"}
GIVEN = {
    "student_logits",
    "teacher_logits",
    "student",
    "teacher",
    "mask",
    "labels",
    "top_ids",
    "top_log_probs",
    "num_examples",
    "log_prior",
}


@dataclass(frozen=True)
class LossTerm:
    """One loss of a weighted sum.

    Args:
        name: Which loss; a key of ``LOSSES``.
        weight: What it is multiplied by.
        options: The loss's own arguments.
        layers: Pairs (student layer, teacher layer) of a loss on features; "uniform" spreads the
            student's layers over the teacher's, "last" compares the last ones.
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    layers: str | tuple[tuple[Layer, Layer], ...] = "uniform"

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise InputError(f"there is no loss {self.name}; there are {', '.join(LOSSES)}")
        if not 0 <= self.weight < float("inf"):
            raise InputError(f"the weight of {self.name} must be at least 0, got {self.weight}")
        known = _options(self.name)
        wrong = sorted(set(self.options) - set(known))
        if wrong:
            options = ", ".join(sorted({"weight", *known}))
            raise InputError(f"{self.name} has no option {wrong[0]}; it has {options}")
        checked = {k: _checked(self.name, k, v, known[k]) for k, v in self.options.items()}
        object.__setattr__(self, "options", checked)
        if self.name in RESPONSE and self.layers != "uniform":
            raise InputError(f"{self.name} compares answers, not layers; leave layers out")
        if isinstance(self.layers, str) and self.layers not in ("uniform", "last"):
            raise InputError(f"layers must be pairs, uniform or last, got {self.layers}")
        if self.name in RESPONSE:  # the loss itself knows the ranges of its options
            goal, one = Goal(mx.zeros((1, 2))), mx.zeros((1,), mx.int32)
            try:
                _response(self, mx.zeros((1, 2)), goal, one, mx.ones((1,)))
            except ValueError as error:
                raise InputError(f"{self.name}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> "LossTerm":
        """Return the term of ``name:option=value,layers=0-3/1-7``."""
        name, _, rest = text.partition(":")
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise InputError(f"{text}: expected option=value, got {part}")
            if key.strip() in values:
                raise InputError(f"{text}: {key.strip()} is given twice")
            values[key.strip()] = value.strip()
        return cls.of({"name": name.strip(), **values})

    @classmethod
    def of(cls, values: dict[str, Any]) -> "LossTerm":
        """Return the term that a mapping describes, as a YAML file has it."""
        rest = dict(values)
        name = rest.pop("name", None)
        if not isinstance(name, str):
            raise InputError(f"a loss needs a name, got {values}")
        weight = _number(rest.pop("weight", 1.0), f"the weight of {name}")
        layers = _layers(rest.pop("layers", "uniform"))
        return cls(name, weight, {key: _value(value) for key, value in rest.items()}, layers)

    def __str__(self) -> str:
        parts = [f"weight={self.weight}", *(f"{k}={v}" for k, v in self.options.items())]
        if self.name not in RESPONSE:
            pairs = self.layers
            if not isinstance(pairs, str):
                pairs = "/".join(f"{ours}-{theirs}" for ours, theirs in pairs)
            parts.append(f"layers={pairs}")
        return f"{self.name}:{','.join(parts)}"


@dataclass(frozen=True)
class Goal:
    """What a teacher says at some positions, in rows.

    Args:
        logits: (N, V), or None if only the top tokens are known.
        top_ids: (N, K), where only those are known.
        top_log_probs: Normalised over the whole vocabulary, most probable first.
        vocab_size: Of the teacher, where only the top tokens are known.
        known: (N,), 0 where the teacher says nothing; None if it always does.
        log_prior: (V,), how probable tokens are on the whole; not normalised.
    """

    logits: mx.array | None = None
    top_ids: mx.array | None = None
    top_log_probs: mx.array | None = None
    vocab_size: int = 0
    known: mx.array | None = None
    log_prior: mx.array | None = None


def response_losses(
    terms: Sequence[LossTerm],
    logits: mx.array,
    goal: Goal | None,
    labels: mx.array,
    mask: mx.array,
) -> tuple[mx.array, list[mx.array]]:
    """Return the weighted sum of the response terms over positions, and each term's own sum."""
    total, sums = mx.array(0.0), []
    for term in terms:
        value, _ = _response(term, logits, goal, labels, mask)
        total = total + term.weight * value
        sums.append(mx.stop_gradient(value))
    return total, sums


def _response(
    term: LossTerm, logits: mx.array, goal: Goal | None, labels: mx.array, mask: mx.array
) -> response.Loss:
    if term.name == "hard":
        return response.hard_labels(logits, labels, mask, **term.options)
    if goal is None or (goal.logits is None and goal.top_ids is None):
        raise InputError(f"{term.name} needs a teacher")
    if goal.known is not None:
        mask = mask * goal.known
    if term.name == "sparse_kl":
        return _sparse(term, logits, goal, mask)
    if goal.logits is None:
        raise InputError(
            f"{term.name} needs all of the teacher's logits, and a cache has the top ones; "
            "use sparse_kl"
        )
    theirs = goal.logits
    if term.name != "sorted_l1":  # padded heads: what only one of them has is never a token
        width = min(logits.shape[-1], theirs.shape[-1])
        logits, theirs = logits[..., :width], theirs[..., :width]
    if term.name == "decoupled_kd":
        return response.decoupled_kd(logits, theirs, labels, mask, **term.options)
    return LOSSES[term.name](logits, theirs, mask, **term.options)


def _sparse(term: LossTerm, logits: mx.array, goal: Goal, mask: mx.array) -> response.Loss:
    options = {key: value for key, value in term.options.items() if key != "k"}
    width = logits.shape[-1]
    ids, log_probs = _top(goal, term.options.get("k"), width)
    if goal.vocab_size > width:  # padded heads: one more entry stands for what is never a token
        logits = mx.pad(logits, [(0, 0), (0, 1)], constant_values=-mx.inf)
        log_probs = mx.where(ids < width, log_probs, -mx.inf)
        ids = mx.minimum(ids, width)
    return response.sparse_kl(
        logits, ids, log_probs, mask, **options, log_prior=_prior(goal, logits)
    )


def _prior(goal: Goal, logits: mx.array) -> mx.array:
    """Return how probable tokens are where a goal says nothing; equally, if it does not know."""
    width = logits.shape[-1]
    known = mx.zeros((0,)) if goal.log_prior is None else goal.log_prior[:width]
    return mx.pad(known, (0, width - known.size))


def _top(goal: Goal, k: int | None, width: int) -> tuple[mx.array, mx.array]:
    """Return the teacher's top tokens and their log-probabilities."""
    if goal.top_ids is not None and goal.top_log_probs is not None:
        known = goal.top_ids.shape[-1]
        if k is not None and k > known:
            raise InputError(f"sparse_kl asks for {k} tokens per position, the cache has {known}")
        return goal.top_ids[..., :k], goal.top_log_probs[..., :k]
    assert goal.logits is not None
    logits = goal.logits[..., :width].astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    k = min(64 if k is None else k, logits.shape[-1])
    ids = mx.argpartition(-log_probs, k - 1, axis=-1)[..., :k]
    return ids, mx.take_along_axis(log_probs, ids, axis=-1)


def _options(name: str) -> dict[str, Any]:
    """Return a loss's own options and their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters
    known = {key: item.default for key, item in parameters.items() if key not in GIVEN}
    return known | {"k": 64} if name == "sparse_kl" else known


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """Return an option, or raise InputError if it is unlike its default, or of no use."""
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}
        wanted = kind.get(type(default), "a text")
        raise InputError(f"the {key} of {name} must be {wanted}, got {value}")
    if isinstance(default, float) and not math.isfinite(value):
        raise InputError(f"the {key} of {name} must be finite, got {value}")
    if key in ("k", "temperature", "eps") and value <= 0:
        raise InputError(f"the {key} of {name} must be above 0, got {value}")
    return type(default)(value)


def _layers(value: Any) -> str | tuple[tuple[Layer, Layer], ...]:
    if isinstance(value, str) and "-" not in value:
        return value
    pairs = value.split("/") if isinstance(value, str) else value
    try:
        split = [_split(pair) if isinstance(pair, str) else pair for pair in pairs]
        return tuple((_layer(ours), _layer(theirs)) for ours, theirs in split)
    except (TypeError, ValueError):
        raise InputError(f"layers must be pairs as 0-3/1-7, uniform or last, got {value}") from None


def _split(pair: str) -> Sequence[str]:
    """Return both sides of a pair of layers; their numbers may be negative."""
    found = re.fullmatch(r"(.*[^-])-(-?[^-]+)", pair.strip())
    return found.groups() if found else ()


def _layer(value: Any) -> Layer:
    if isinstance(value, int):
        return value
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdigit() else text


def _value(value: Any) -> Any:
    """Return a flag's text as the number or truth value it spells."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value}") from None
