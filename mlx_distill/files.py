"""Files in and out: JSON objects, JSONL, folders and files that appear whole, hashes of content."""

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import InputError, one_line
from mlx_distill.locks import Busy, own_folder
from mlx_distill.parsing import parse_json
from mlx_distill.regular import check_regular
from mlx_distill.safetensors import check_safetensors

__all__ = [
    "arrays_hash",
    "check_safetensors",
    "naming",
    "new_path",
    "output_path",
    "read_json",
    "read_jsonl",
    "usable_path",
    "whole_folder",
    "write_arrays",
    "write_new",
    "write_whole",
]

WRITING = ".writing"  # behind the name of what is not whole yet
LONGEST_LINE = 2**28  # characters of a row; a compressed file of zeros has no line's end


def usable_path(name: str | Path, what: str) -> Path:
    """Return the path of a name that the system can hold.

    Args:
        name: What the user gave; ``~`` is the home folder.
        what: What it names, for the error.

    Raises:
        InputError: If it is empty, or no path can be written so.
    """
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else name
    if not isinstance(text, str):
        raise InputError(f"{what} must be a path, got {name!r:.40}")
    if not text.strip():
        raise InputError(f"{what} has an empty name")
    try:
        if b"\0" in os.fsencode(text):
            raise InputError(f"{what} {text} cannot be a path: it holds a zero byte")
    except UnicodeEncodeError:
        raise InputError(f"{what} {text} cannot be a path: it is not text") from None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home folder of a user that there is not
        raise InputError(f"{what} {text} cannot be a path: its home folder is not known") from None


def output_path(name: str | Path) -> Path:
    """Return the path of what is to be written.

    Raises:
        InputError: If it is no path, or names a place and nothing new in it, as ``.`` and ``/`` do.
    """
    path = usable_path(name, "the output")
    if path.name in ("", ".."):
        raise InputError(f"the output {name} is no name of a new file or folder")
    return path


def new_path(name: str | Path) -> Path:
    """Return the path of what is to be written, and is not there yet.

    Raises:
        InputError: If it is, or it is no path of something new.
    """
    path = output_path(name)
    try:
        taken = is_taken(path)
        path.with_name(path.name + WRITING).exists()  # under this name it is written first
    except OSError as error:  # a name too long, or a folder that nobody may look into
        raise InputError(f"the output {name} cannot be written: {error.strerror}") from None
    if taken:
        raise InputError(f"the output {name} exists; name another, or remove it")
    return path


def is_taken(path: Path) -> bool:
    """Return whether there is something of a name, be it a link to nothing."""
    return path.exists() or path.is_symlink()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    try:
        value = parse_json(text)
    except InputError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one, never a half."""
    writing = path.with_name(path.name + WRITING)
    try:
        with naming(path):
            writing.write_text(text, encoding="utf-8")
            os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of what is written here say which file it is of; the system's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_new(path: Path, text: str) -> None:
    """Write a text file as ``write_whole`` does; what stands there by now is not written over.

    Raises:
        InputError: If something does.
    """
    write_whole(new_path(path), text)


def write_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file; it appears whole, in place of an older one, or not at all.

    Raises:
        InputError: If it cannot be written.
    """
    writing = path.with_name(f"writing-{os.getpid()}-{path.name}")
    try:
        mx.save_safetensors(str(writing), arrays, {"format": "mlx"})
        check_safetensors(writing)  # a full disk may have cut it short
        os.replace(writing, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} could not be written: {one_line(error)}") from None
    finally:
        writing.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it takes its name when the block ends well, or vanishes.

    Every safetensors file in it is checked first: a full disk may have cut it short.

    Raises:
        InputError: If it cannot be written, another run writes it, or the name is taken meanwhile.
    """
    writing = folder.with_name(folder.name + WRITING)
    try:
        with own_folder(writing, folder):
            try:
                yield writing
                for weights in writing.glob("*.safetensors"):
                    check_safetensors(weights)
                os.replace(writing, folder)
            finally:
                shutil.rmtree(writing, ignore_errors=True)
    except Busy:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder} could not be written: {one_line(error)}") from None


def arrays_hash(arrays: Sequence[mx.array]) -> str:
    """Return a hash of every value of some arrays, their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()[:16]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file in order, each behind its place; blank lines are skipped.

    The place is "FILE, line NUMBER", counted from 1, for complaints about what the object holds.
    A file whose name ends in .gz is unpacked on the way; byte order marks are no part of the text.

    Raises:
        InputError: If the file cannot be read or a line is not a JSON object. The message names
            the file, the line (from 1) and the reason.
    """
    path = usable_path(path, "the data")
    try:
        with _open_text(path) as file:
            lines = iter(lambda: file.readline(LONGEST_LINE), "")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _parse_row(line, place)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _open_text(path: Path) -> TextIOWrapper:
    """Open a text file, packed or not."""
    check_regular(path)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parse_row(line: str, place: str) -> dict[str, Any]:
    if len(line) == LONGEST_LINE:
        raise InputError(f"{place}: it is longer than {LONGEST_LINE:,} characters")
    try:
        row = parse_json(line.removeprefix("\ufeff"))  # files with such a mark, one behind another
    except InputError as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row
