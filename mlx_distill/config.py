"""Frozen dataclasses as flags and YAML files: every default, help text and check is written once.

The help of a flag is the field's entry in the ``Args`` section of the dataclass's docstring, and
its default is the field's. What a field may be stands in its type (see ``limits``) and is shown in
the help.
"""

import argparse
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlx_distill.errors import InputError, one_line
from mlx_distill.limits import Between, OneOf, hints, kind_of
from mlx_distill.parsing import parse_yaml
from mlx_distill.regular import check_regular

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
    kinds = {name: kind_of(hint) for name, hint in hints(config).items()}
    group = parser.add_argument_group(_title(config))
    for item in dataclasses.fields(config):
        kind = kinds[item.name]
        if dataclasses.is_dataclass(kind.scalar):
            continue
        name = (rename or {}).get(item.name, item.name.replace("_", "-"))
        options: dict[str, Any] = {"dest": item.name, "default": item.default}
        if kind.many:
            options["nargs"] = "+"
        text = helps.get(item.name, "").rstrip(".").replace("%", "%%")
        text += _limits(item.default, kind.rule)
        if kind.scalar is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(f"--{name}", action=action, help=text, **options)
            continue
        metavar = kind.scalar.__name__.upper()
        group.add_argument(f"--{name}", type=kind.scalar, help=text, metavar=metavar, **options)


def from_flags(config: type[T], arguments: argparse.Namespace, **others: Any) -> T:
    """Return the dataclass that the flags describe; ``others`` are fields without a flag."""
    values = {}
    for item in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        if item.name not in others and hasattr(arguments, item.name):
            value = getattr(arguments, item.name)
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return config(**values, **others)


def from_file(hint: Any, value: Any) -> Any:
    """Return a configuration file's value as a field of some type holds it.

    Raises:
        TypeError: If it is of another kind; the text says what is expected.
    """
    kind = kind_of(hint)
    if value is None and kind.optional:
        return None
    if kind.many:
        values = value if isinstance(value, list) else [value]
        return [_from_file(kind.scalar, one) for one in values]
    return _from_file(kind.scalar, value)


def _as_it_is(value: Any) -> Any:
    return value


def _from_file(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
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
        check_regular(path)
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


def _limits(default: Any, rule: Between | OneOf | None) -> str:
    """Return what the help says of a field's values; argparse knows the default in the end."""
    said = [] if rule is None else [str(rule)]
    if isinstance(default, tuple) and default:
        said.append(f"default: {' '.join(map(str, default))}")
    elif default not in (None, ()):
        said.append("default: %(default)s")
    return f" ({'; '.join(said)})" if said else ""


def _field_helps(config: type) -> dict[str, str]:
    """Return the entries of the ``Args`` section of a docstring, as single lines."""
    doc = inspect.getdoc(config) or ""
    section = re.search(r"Args:\n(.*?)(?:\n\n|\n\S|\Z)", doc, re.DOTALL)
    entries = re.split(r"\n {4}(?=\w)", "\n" + section[1]) if section else []
    pairs = (entry.split(":", 1) for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()) for name, text in pairs}


def _title(config: type) -> str:
    return (inspect.getdoc(config) or config.__name__).splitlines()[0].rstrip(".")
