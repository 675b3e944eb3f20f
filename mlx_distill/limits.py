"""What values may be, written in types: kinds of numbers and their limits.

    batch_size: Annotated[int, Between(1, 65_536)] = 8
    long: Annotated[str, OneOf("cut", "drop", "refuse")] = "cut"

A dataclass calls ``check_fields`` where it is made, so that a command and Python refuse the same
values with the same sentence, before anything is loaded.
"""

import dataclasses
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeGuard

from mlx_distill.errors import InputError

_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Between:
    """The numbers that a field takes; those of ``above`` lie beyond it, the others may be equal.

    Args:
        low: The smallest.
        high: The largest; None for no end.
        above: Larger than this one.
        also: One more number that is taken, and means something else.
    """

    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None
    also: int | None = None

    def __str__(self) -> str:
        other = "" if self.also is None else f"{self.also}, or "
        if self.above is not None:
            least = f"{other}above {_number(self.above)}"
            return least if self.high is None else f"{least} and at most {_number(self.high)}"
        if self.high is None:
            return f"{other}at least {_number(self.low)}"
        return f"{other}between {_number(self.low)} and {_number(self.high)}"

    def check(self, name: str, value: Any) -> None:
        """Raise InputError if a number lies beyond."""
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        above = -math.inf if self.above is None else self.above
        if value == self.also or (low <= value <= high and value > above):
            return
        # One limit reads better than two.
        below = self.low is not None and value < self.low and self.also is None
        rule = Between(self.low) if below else self
        raise InputError(f"{name} must be {rule}, got {_said(value)}")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The values that a field takes."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        *first, last = map(str, self.values)
        return f"{', '.join(first)} or {last}"

    def check(self, name: str, value: Any) -> None:
        """Raise InputError if a value is none of them."""
        if value not in self.values:
            raise InputError(f"{name} must be {self}, got {_said(value)}")


Seed = Annotated[int, Between(0, 2**32 - 1)]
Count = Annotated[int, Between(1, 10**9)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a type says of the values of a field: their class, how many, and their limits."""

    scalar: type
    optional: bool = False
    many: bool = False
    rule: Between | OneOf | None = None

    @property
    def noun(self) -> str:
        """What a value has to be."""
        name = self.scalar.__name__
        return _NOUNS.get(self.scalar, f"{'an' if name[0] in 'AEIO' else 'a'} {name}")

    def takes(self, value: Any) -> bool:
        """Return whether a value is of the class; of classes that are not known, any is."""
        if self.scalar in (int, float):
            # An integer may be beyond any float, which cannot be asked whether it is finite.
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole or (self.scalar is float and is_finite(value))
        known = self.scalar in _NOUNS or dataclasses.is_dataclass(self.scalar)
        return not known or isinstance(value, self.scalar)


def check_fields(config: Any) -> None:
    """Raise InputError if a field of a dataclass is not what its type says.

    Lists become tuples, and NumPy's numbers Python's: two configurations that say the same are
    equal, and JSON.
    """
    for name, hint in hints(type(config)).items():
        given, kind = getattr(config, name), kind_of(hint)
        value = plain(given) if kind.many or kind.scalar in (int, float) else given
        check_value(name, value, hint)
        if value is not given:
            object.__setattr__(config, name, value)


def plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's, and a list as a tuple; anything else as it is."""
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def listed(name: str, values: Any) -> list[Any]:
    """Return several values, which may come from a generator, as a list.

    Raises:
        InputError: If it is one value: a text would be taken for its letters, bytes for numbers.
    """
    try:
        if not isinstance(values, str | bytes | bytearray | Mapping):
            return list(values)
    except (TypeError, ValueError):  # a number; an array without axes
        pass
    raise InputError(f"{name} must be a list, got {values!r:.40}")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise InputError if a value is not what its type says, such as ``Count`` or ``str | None``.

    Numbers are finite, True is none of them, and a text is no list of letters. Of types that are
    neither these nor dataclasses nothing is said.
    """
    kind = kind_of(hint)
    if value is None and kind.optional:
        return
    values = value if kind.many else (value,)
    if not isinstance(values, tuple | list):
        raise InputError(f"{name} must be a list, got {_said(value)}")
    for one in values:
        if not kind.takes(one):
            shown = repr(one) if isinstance(one, str) else _said(one)
            raise InputError(f"{name} must be {kind.noun}, got {shown}")
        if kind.rule is not None:
            kind.rule.check(name, one)


@functools.cache
def hints(config: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with their limits."""
    return typing.get_type_hints(config, include_extras=True)


@functools.cache
def kind_of(hint: Any) -> Kind:
    """Return what a type says; of what is neither one class nor a tuple of one, nothing."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rules = (one for one in parts[1:] if isinstance(one, Between | OneOf))
        inner = kind_of(parts[0])
        return dataclasses.replace(inner, rule=next(rules, inner.rule))
    if origin in (types.UnionType, typing.Union):
        some = [part for part in parts if part is not type(None)]
        inner = kind_of(some[0]) if len(some) == 1 else Kind(object)
        return dataclasses.replace(inner, optional=len(some) < len(parts))
    if origin is tuple and parts[1:] == (...,):
        return dataclasses.replace(kind_of(parts[0]), many=True)
    return Kind(hint if isinstance(hint, type) else object)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether this is a number that a float can hold; True is none."""
    most = sys.float_info.max
    return isinstance(value, float | int) and not isinstance(value, bool) and -most <= value <= most


def _number(value: int | float | None) -> str:
    """Return a limit as one writes it: 4,294,967,295 and 0.5."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}".replace("e-0", "e-")


def _said(value: Any) -> str:
    """Return a value as a sentence shows it; Python writes no number of 5,000 digits."""
    try:
        return str(value)
    except ValueError:
        return "a longer number"
