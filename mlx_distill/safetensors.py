"""The headers of safetensors files: what arrays they hold, checked before any array is read.

A file begins with the header's length, eight bytes, and the header, a JSON object that says of
every array its type, its shape and where its bytes lie behind the header. They lie one behind
another, and nothing else does.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import InputError, one_line
from mlx_distill.parsing import parse_json
from mlx_distill.regular import check_regular

BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
LONGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickled(path: Path) -> None:
    """Raise InputError if a file, or one of those in a folder, is pickled: it is never read."""
    files = [path] if path.is_file() else sorted(path.glob("*"))
    for file in files:
        if file.suffix in PICKLED:
            raise InputError(
                f"{file} is pickled and could run code when it is read; where you trust it, load "
                "it with PyTorch and write it with safetensors.torch.save_file"
            )


@dataclass(frozen=True)
class Tensor:
    """An array of a file: its type under the format's name, its shape, and its bytes' place."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a safetensors file by name.

    Raises:
        InputError: If the file is missing, cut short or not one, or an array's entry is wrong; the
            text names the file and the array.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LONGEST_HEADER):
                raise InputError(f"{path} is damaged: its header is longer than the file")
            text = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, struct.error):
        raise InputError(f"{path} is damaged: its header cannot be read") from None
    try:
        entries = parse_json(text)
    except InputError as error:
        raise InputError(f"{path} is damaged: its header cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path} is damaged: its header is no JSON object")
    entries.pop("__metadata__", None)
    try:
        tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
        end = _packed_end(tensors)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if 8 + length + end != size:
        raise InputError(
            f"{path} is damaged: it has {size} bytes, its header speaks of {8 + length + end}"
        )
    return tensors


def check_safetensors(path: Path) -> None:
    """Raise InputError if a safetensors file is missing, cut short or not one."""
    read_header(path)


def _tensor(name: str, entry: Any) -> Tensor:
    """Return an array's entry; its parts may be anything."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{name} has the unknown type {dtype}")
    if not _whole(shape):
        raise InputError(f"{name} has no shape, but {shape}")
    if not _whole(place) or len(place) != 2 or place[0] > place[1]:
        raise InputError(f"{name} has no place, but {place}")
    tensor = Tensor(dtype, tuple(shape), *place)
    if 8 * (tensor.end - tensor.start) != tensor.size * BITS[dtype]:
        raise InputError(
            f"{name} is {dtype} of shape {list(shape)}, and has {tensor.end - tensor.start} bytes"
        )
    return tensor


def _whole(values: Any) -> bool:
    """Return whether something is a list of whole numbers, none of them negative."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _packed_end(tensors: dict[str, Tensor]) -> int:
    """Return where the last array ends; between them there must be neither gaps nor overlaps."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise InputError(f"{name} begins at byte {tensor.start}, the one before ends at {end}")
        end = tensor.end
    return end


def read_arrays(path: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file by name.

    Raises:
        InputError: If an array has a type that MLX does not have, such as float64.
    """
    try:
        arrays = mx.load(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    assert isinstance(arrays, dict)
    return arrays


def check_floats(arrays: Mapping[str, mx.array], path: Path) -> None:
    """Raise InputError if an array of a file holds whole numbers, truth values or complex ones."""
    for name, array in arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            kind = str(array.dtype).removeprefix("mlx.core.")
            raise InputError(f"{path}: {name} is {kind}; weights that are not packed are floats")
