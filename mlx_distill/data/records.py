"""JSON in, checked: every complaint names its file, and the line where there are lines."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_distill.errors import InputError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one, never a half."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, path)


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file in order, each behind its place; blank lines are skipped.

    The place is "FILE, line NUMBER", counted from 1, for complaints about what the object holds.

    Raises:
        InputError: If the file cannot be read or a line is not a JSON object. The message names
            the file, the line (from 1) and the reason.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _parse(line, place)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row
