"""Files in and out: JSON objects, atomic writes, safetensors headers, hashes of content."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

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


def arrays_hash(arrays: Sequence[mx.array]) -> str:
    """Return a hash of every value of some arrays, their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()[:16]


def check_safetensors(path: Path) -> None:
    """Raise InputError if a safetensors file is missing, cut short or not one.

    The file begins with the header's length, eight bytes, and the header, which says where each
    array lies; only the header is read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise InputError(f"{path} is damaged: its header is longer than the file")
            header = json.loads(file.read(length))
        end = max(
            (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
        )
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: its header cannot be read") from None
    if 8 + length + end != size:
        raise InputError(
            f"{path} is damaged: it has {size} bytes, its header speaks of {8 + length + end}"
        )


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
                    yield place, _parse_row(line, place)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row
