"""Frozen dataclasses as flags and YAML files: every default, help text and check is written once.

The help of a flag is the field's entry in the ``Args`` section of the dataclass's docstring, and
its default is the field's.
"""

import argparse
import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mlx_distill.errors import InputError, one_line

T = TypeVar("T")


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
        default = "" if item.default in (None, ()) else " (default: %(default)s)"
        if isinstance(item.default, tuple):
            default = default.replace("%(default)s", " ".join(map(str, item.default)))
        text = helps.get(item.name, "").rstrip(".").replace("%", "%%") + default
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"the config {path} cannot be read: {error.problem}{line}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
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
