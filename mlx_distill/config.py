"""Frozen dataclasses as flags and YAML files: every default, help text and check is written once.

The help of a flag is the field's entry in the ``Args`` section of the dataclass's docstring, and
its default is the field's. What a field may be stands in its type, is shown in the help, and is
checked by ``check_fields``::

    batch_size: Annotated[int, Between(1, 65_536)] = 8
    long: Annotated[str, OneOf("cut", "drop", "refuse")] = "cut"
"""

import argparse
import contextlib
import dataclasses
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mlx_distill.errors import InputError, one_line
from mlx_distill.parsing import parse_yaml

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Between:
    """The numbers that a field takes; those of ``above`` lie beyond it, the others may be equal.

    Args:
        low: The smallest.
        high: The largest; None for no end.
        above: Larger than this one.
    """

    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None

    def __str__(self) -> str:
        least = (
            f"above {self.above:g}" if self.above is not None else f"at least {_number(self.low)}"
        )
        if self.high is None:
            return least
        if self.above is not None:
            return f"{least} and at most {_number(self.high)}"
        return f"between {_number(self.low)} and {_number(self.high)}"

    def check(self, name: str, value: Any) -> None:
        """Raise InputError if a number lies beyond; NaN does."""
        low = -math.inf if self.low is None else self.low
        high = sys.float_info.max if self.high is None else self.high
        if not low <= value <= high or (self.above is not None and not value > self.above):
            # One limit reads better than two.
            rule = Between(self.low) if self.low is not None and value < self.low else self
            raise InputError(f"{name} must be {rule}, got {value}")


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
            raise InputError(f"{name} must be {self}, got {value}")


Seed = Annotated[int, Between(0, 2**32 - 1)]
Count = Annotated[int, Between(1, 10**9)]


def check_fields(config: Any) -> None:
    """Raise InputError if a field of a dataclass is not what its type says; None is left alone."""
    for name, rule in _rules(type(config)).items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if one is not None:
                rule.check(name, one)


def number(rule: Between, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Return what argparse takes for a ``type``: a number that a rule allows."""

    def parse(text: str) -> Any:
        value = kind(text)
        try:
            rule.check("it", value)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    parse.__name__ = kind.__name__
    return parse


def add_flags(
    parser: argparse.ArgumentParser, config: type, rename: dict[str, str] | None = None
) -> None:
    """Add a flag for every field of a dataclass that is not a dataclass itself.

    Args:
        parser: Gets a group of flags.
        config: The dataclass.
        rename: Flags that are not called like their field, without the dashes.
    """
    helps = _field_helps(config)
    hints = typing.get_type_hints(config)
    rules = _rules(config)
    group = parser.add_argument_group(_title(config))
    for item in dataclasses.fields(config):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            continue
        name = (rename or {}).get(item.name, item.name.replace("_", "-"))
        options: dict[str, Any] = {"dest": item.name, "default": item.default}
        scalar, many = _scalar(kind)
        if many:
            options["nargs"] = "+"
        text = helps.get(item.name, "").rstrip(".").replace("%", "%%")
        text += _limits(item.default, rules.get(item.name))
        if scalar is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(f"--{name}", action=action, help=text, **options)
            continue
        group.add_argument(
            f"--{name}", type=scalar, help=text, metavar=scalar.__name__.upper(), **options
        )


def from_flags(config: type[T], arguments: argparse.Namespace, **others: Any) -> T:
    """Return the dataclass that the flags describe; ``others`` are fields without a flag."""
    values = {}
    for item in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        if item.name not in others and hasattr(arguments, item.name):
            value = getattr(arguments, item.name)
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return config(**values, **others)


def from_file(kind: Any, value: Any) -> Any:
    """Return a configuration file's value as a field of some type holds it.

    Raises:
        TypeError: If it is of another kind; the text says what is expected.
    """
    scalar, many = _scalar(kind)
    if value is None and type(None) in typing.get_args(kind):
        return None
    if many:
        values = value if isinstance(value, list) else [value]
        return [_from_file(scalar, one) for one in values]
    return _from_file(scalar, value)


def _as_it_is(value: Any) -> Any:
    return value


def _from_file(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 1e-3 for a text
    if type(value) is not kind:
        raise TypeError(f"{value!r}, expected {kind.__name__}")
    return value


def read_yaml(
    path: Path, kinds: Mapping[str, Any], forms: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Return the values of a configuration file.

    Args:
        path: The file.
        kinds: The types of what it may hold, by name.
        forms: What makes a flag's value of the form that a name may have in a file, by name.

    Raises:
        InputError: If it cannot be read, or a key or a value is none of ours.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # an InputError is one
        raise InputError(f"the config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"the config {path} does not hold names and values")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"the config {path} has an unknown field {name}")
        try:
            values[name] = from_file(kinds[name], forms.get(name, _as_it_is)(value))
        except TypeError as error:
            raise InputError(f"the config {path}: {name} is {error}") from None
    return values


def flat(config: Any) -> dict[str, Any]:
    """Return a configuration as ``--config`` reads it."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value)
        else:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def check_seed(name: str, seed: int) -> None:
    """Raise InputError if a number cannot seed the generators, NumPy's and MLX's alike."""
    if not 0 <= seed < 2**32:
        raise InputError(f"{name} must be between 0 and 2**32 - 1, got {seed}")


def _number(value: int | float | None) -> str:
    """Return a limit as one writes it: 4,294,967,295 and 0.5."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _limits(default: Any, rule: Between | OneOf | None) -> str:
    """Return what the help says of a field's values; argparse knows the default in the end."""
    said = [] if rule is None else [str(rule)]
    if isinstance(default, tuple) and default:
        said.append(f"default: {' '.join(map(str, default))}")
    elif default not in (None, ()):
        said.append("default: %(default)s")
    return f" ({'; '.join(said)})" if said else ""


def _rules(config: type) -> dict[str, Between | OneOf]:
    """Return what the fields of a dataclass may be, of those whose types say it."""
    found = {}
    for name, kind in typing.get_type_hints(config, include_extras=True).items():
        parts = [kind, *typing.get_args(kind)]  # of T | None and tuple[T, ...] too
        rules = (rule for part in parts for rule in getattr(part, "__metadata__", ()))
        for rule in rules:
            if isinstance(rule, Between | OneOf):
                found[name] = rule
    return found


def _scalar(kind: Any) -> tuple[type, bool]:
    """Return the type of a field's values, and whether it takes several."""
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None)), False
    return kind, False


def _field_helps(config: type) -> dict[str, str]:
    """Return the entries of the ``Args`` section of a docstring, as single lines."""
    doc = inspect.getdoc(config) or ""
    section = re.search(r"Args:\n(.*?)(?:\n\n|\n\S|\Z)", doc, re.DOTALL)
    entries = re.split(r"\n {4}(?=\w)", "\n" + section[1]) if section else []
    pairs = (entry.split(":", 1) for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()) for name, text in pairs}


def _title(config: type) -> str:
    return (inspect.getdoc(config) or config.__name__).splitlines()[0].rstrip(".")
