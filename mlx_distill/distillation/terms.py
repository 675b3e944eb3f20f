"""The terms of an objective: losses by name, with a weight and options.

    forward_kl:weight=0.9,temperature=2  hard:weight=0.1  hidden_mse:layers=0-3/1-7

A term has a weight, the loss's own options, and, if it compares features, pairs of layers
(student-teacher). Response losses are summed over positions and divided once by their number;
feature and relation losses are means over a batch.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import mlx.core as mx

from mlx_distill.errors import InputError
from mlx_distill.limits import Between, check_value
from mlx_distill.losses import acceptance, feature, relation, response
from mlx_distill.target.taps import Layer

RESPONSE: dict[str, Callable[..., mx.array]] = {
    "hard": response.hard_labels,
    "forward_kl": response.forward_kl,
    "reverse_kl": response.reverse_kl,
    "jensen_shannon": response.jensen_shannon,
    "skew_forward_kl": response.skew_forward_kl,
    "skew_reverse_kl": response.skew_reverse_kl,
    "total_variation": acceptance.total_variation,
    "soft_cross_entropy": response.soft_cross_entropy,
    "logit_mse": response.logit_mse,
    "decoupled_kd": response.decoupled_kd,
    "sparse_kl": response.sparse_kl,
    "sorted_l1": response.sorted_l1,
}
FEATURE: dict[str, Callable[..., mx.array]] = {
    "hidden_mse": feature.hidden_mse,
    "hidden_cosine": feature.hidden_cosine,
    "patient_kd": feature.patient_kd,
    "attention_transfer": feature.attention_transfer,
}
RELATION: dict[str, Callable[..., mx.array]] = {
    "flow_of_solution": relation.flow_of_solution,
    "relational_distance": relation.relational_distance,
    "relational_angle": relation.relational_angle,
    "similarity_preserving": relation.similarity_preserving,
    "probabilistic_transfer": relation.probabilistic_transfer,
    "neuron_selectivity": relation.neuron_selectivity,
    "contrastive": relation.contrastive,
}
LOSSES = RESPONSE | FEATURE | RELATION
# Response losses that take logits, as they are; the others take log-probabilities.
ON_LOGITS = {"forward_kl", "soft_cross_entropy", "logit_mse"}
# Both networks' logits are divided by the temperature that these terms may have. Gradients shrink
# with its square, so divergences are multiplied by it (Hinton et al. 2015, section 2.1).
TEMPERED = RESPONSE.keys() - {"hard"}
SCALED = TEMPERED - {"total_variation", "logit_mse", "sorted_l1"}
# Response losses that need no more of the teacher than its top tokens.
CACHED = {"hard", "sparse_kl"}
# Losses whose student features go through a learned projection where the widths differ.
PROJECTED = {"hidden_mse", "hidden_cosine", "patient_kd", "contrastive", "flow_of_solution"}
Weight = Annotated[float, Between(0, 10**6)]
# Of options of one meaning in every loss; what is of one loss alone, it checks itself.
LIMITS = {
    "k": Between(1, 10**9),
    "temperature": Between(1e-6, 1000),
    "eps": Between(above=0, high=1),
}
DROWNS = 10  # so many times another term of the loss, one leaves little of it to be learned
GIVEN = {
    "student",
    "student_logits",
    "student_log_probs",
    "teacher",
    "teacher_logits",
    "teacher_log_probs",
    "teacher_probs",
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
        options: The loss's own arguments, and for response losses ``temperature``, which divides
            the logits, and ``scaled``, whether the loss is multiplied by its square.
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
        check_value(f"the weight of {self.name}", self.weight, Weight)
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
        if self.name in RESPONSE:
            self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise InputError if an option is out of its range: the loss itself knows."""
        bucket = self.options.get("tail", "bucket") in ("bucket", "prior")
        temperature = self.options.get("temperature", 1)
        if self.name == "sparse_kl" and bucket and temperature != 1:
            # How the tail would spread at another temperature is not known.
            raise InputError(
                f"a tail bucket needs temperature 1, got {temperature}; use tail teacher or both"
            )
        loss, some = LOSSES[self.name], mx.zeros((1, 2))
        needed = inspect.signature(loss).parameters.keys() & (GIVEN - {"teacher_probs"})
        whole = {"labels": mx.zeros((1,), mx.int32), "top_ids": mx.zeros((1, 1), mx.int32)}
        others = {"top_log_probs": mx.zeros((1, 1)), "log_prior": mx.zeros((2,))}
        given = {name: (whole | others).get(name, some) for name in needed}
        try:
            loss(**given, **self.own_options)
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from None

    @property
    def own_options(self) -> dict[str, Any]:
        """The arguments of the loss itself."""
        applied = ("temperature", "scaled", "k") if self.name in RESPONSE else ()
        return {name: value for name, value in self.options.items() if name not in applied}

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
        weight = _value(rest.pop("weight", 1.0))
        check_value(f"the weight of {name}", weight, Weight)
        layers = _layers(rest.pop("layers", "uniform"))
        return cls(name, float(weight), {key: _value(value) for key, value in rest.items()}, layers)

    def __str__(self) -> str:
        parts = [f"weight={self.weight}", *(f"{k}={v}" for k, v in self.options.items())]
        if self.name not in RESPONSE:
            pairs = self.layers
            if not isinstance(pairs, str):
                pairs = "/".join(f"{ours}-{theirs}" for ours, theirs in pairs)
            parts.append(f"layers={pairs}")
        return f"{self.name}:{','.join(parts)}"


def _options(name: str) -> dict[str, Any]:
    """Return a loss's own options and their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters
    known = {key: item.default for key, item in parameters.items() if key not in GIVEN}
    known |= {"k": 64} if name == "sparse_kl" else {}
    known |= {"temperature": 1.0} if name in TEMPERED else {}
    return known | {"scaled": True} if name in SCALED else known


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """Return an option, or raise InputError if it is unlike its default, or of no use."""
    kind = type(default)
    limits = LIMITS.get(key, Between(-(10**6), 10**6))  # beyond, float32 soon has no number
    hint = Annotated[kind, limits] if kind in (int, float) else kind
    check_value(f"the {key} of {name}", value, hint)
    return kind(value)


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
    if isinstance(value, int) and not isinstance(value, bool):
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


def drowned(shares: Mapping[str, float]) -> list[str]:
    """Return a note if one term of a loss leaves too little of another.

    Args:
        shares: Of the first step's loss, by the terms' names, weights included.
    """
    if not shares:
        return []
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    if shares[most] <= DROWNS * shares[least]:
        return []
    return [
        f"{most} was {shares[most]:.1%} of the first step's loss and {least} {shares[least]:.1%}: "
        "the larger one drowns the other; other weights may help"
    ]
