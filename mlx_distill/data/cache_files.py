"""The files of a teacher's cache: its manifest and its shards, checked before they are believed.

A manifest says what the cache was made of, and of every shard which texts it holds; a shard's own
header says what arrays it has. The two, and the texts, must agree: an index that is out of bounds
would be read all the same.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import InputError
from mlx_distill.files import read_json
from mlx_distill.safetensors import Tensor, read_header

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TAILS = ("bucket", "draws")
AGAIN = "running the same --cache-teacher command again"
MADE = {
    "tokenizer_hash": "with another tokenizer, so its token ids mean other tokens",
    "weights_hash": "from another teacher",
    "texts_hash": "of other texts, or of the same ones cut, marked or ordered otherwise",
}
DTYPES = {"U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32, "I64": np.int64}
_NAME = re.compile(r"shard-(\d{5,12})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """One file of a cache, as the manifest lists it.

    Args:
        name: The file's.
        first: Its first text.
        count: Number of its texts.
        positions: Number of their learned tokens.
        sha256: Of the file, in hexadecimal.
    """

    name: str
    first: int
    count: int
    positions: int
    sha256: str


def shard_name(index: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{index:05d}.safetensors"


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Shard]]:
    """Return what a manifest says of the whole cache, and its shards in the order of the texts.

    Raises:
        InputError: If it is missing, of another version, or says what cannot be.
    """
    path = folder / MANIFEST
    header = read_json(path)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version!s:.40}, expected {FORMAT_VERSION}; remove the "
            "folder and cache the teacher again"
        )
    listed = header.pop("shards", None)
    try:
        numbers = [header[name] for name in ("k", "vocab_size", "num_texts", "texts_per_shard")]
        if not all(_is_count(number) and number > 0 for number in numbers):
            raise ValueError
        if header["k"] > header["vocab_size"] or header["tail"] not in TAILS:
            raise ValueError
        shards = [_shard(entry, header) for entry in listed or []]
        if not isinstance(listed, list) or len({shard.name for shard in shards}) != len(shards):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is damaged; remove the folder and cache the teacher again"
        ) from None
    return header, {shard.name: shard for shard in sorted(shards, key=lambda shard: shard.first)}


def _shard(entry: Any, header: Mapping[str, Any]) -> Shard:
    """Return an entry of a manifest.

    Raises:
        ValueError: If it does not fit the whole.
        TypeError: If it is something else.
    """
    shard = Shard(**entry)
    named = _NAME.fullmatch(shard.name)
    if not named or not isinstance(shard.sha256, str):
        raise ValueError
    index, size = int(named[1]), header["texts_per_shard"]
    left = header["num_texts"] - index * size
    fits = shard.name == shard_name(index) and shard.first == index * size
    if not (fits and left > 0 and shard.count == min(size, left) and _is_count(shard.positions)):
        raise ValueError
    return shard


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def manifest(header: Mapping[str, Any], shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Return what ``read_manifest`` reads."""
    return {**header, "shards": [asdict(shards[name]) for name in sorted(shards)]}


def check_made(
    folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    """Raise InputError if a cache was made otherwise than is wanted."""
    for name, value in wanted.items():
        if found.get(name) != value:
            how = MADE.get(name, f"with {name} {found.get(name)!s:.80}, not {value!s:.80}")
            raise InputError(f"{folder} was made {how}; {remedy}")


def check_shard(
    path: Path, shard: Shard, header: Mapping[str, Any], content: bool = False
) -> dict[str, Tensor]:
    """Return the arrays that a shard's header lists.

    Args:
        path: The file.
        shard: What the manifest says of it.
        header: What the manifest says of the whole.
        content: Read the whole file, and compare its hash.

    Raises:
        InputError: If the file is missing or damaged, or has not the arrays that it should have.
    """
    k, positions = header["k"], shard.positions
    wanted = {
        "ids": ("U16" if header["vocab_size"] <= 2**16 else "U32", (positions, k)),
        "log_probs": ("F16", (positions, k)),
        "tail": ("F32", (positions,)),
        "offsets": ("I64", (shard.count + 1,)),
    }
    try:
        arrays = read_header(path)
        if {name: (one.dtype, one.shape) for name, one in arrays.items()} != wanted:
            raise InputError(f"{path} is damaged: its arrays are not those of its manifest")
        if content and sha256(path) != shard.sha256:
            raise InputError(f"{path} is damaged: its content has changed since it was written")
    except (InputError, OSError) as error:
        raise InputError(f"{error}; {AGAIN} rebuilds this file alone") from None
    return arrays


def map_arrays(path: Path, arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, mapped.

    A shuffled batch takes its texts from as many shards: only what it needs of them is read.
    """
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    return {
        name: data[start + one.start : start + one.end].view(DTYPES[one.dtype]).reshape(one.shape)
        for name, one in arrays.items()
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_values(
    path: Path, arrays: Mapping[str, np.ndarray], counts: Sequence[int], vocab_size: int
) -> None:
    """Raise InputError if a shard's values would be read out of bounds, or are none.

    Args:
        path: The shard.
        arrays: What it holds.
        counts: Learned tokens of its texts.
        vocab_size: The teacher's.
    """
    ends = np.cumsum([0, *counts])
    tail = arrays["tail"]
    wrong = {
        "has other numbers of tokens than its texts": not np.array_equal(arrays["offsets"], ends),
        "holds tokens beyond its vocabulary": bool((arrays["ids"] >= vocab_size).any()),
        "holds no probabilities": bool(
            np.isnan(arrays["log_probs"]).any() or not ((tail >= 0) & (tail <= 1)).all()
        ),
    }
    for how, found in wrong.items():
        if found:
            raise InputError(f"{path} {how}; remove it, and {AGAIN} makes it anew")


def whole_shards(folder: Path, header: dict[str, Any], verify: bool) -> dict[str, Shard]:
    """Return the shards of a folder that need not be made again."""
    if not (folder / MANIFEST).exists():
        return {}
    found, shards = read_manifest(folder)
    check_made(folder, found, header, "remove it or name another folder")
    for name, shard in list(shards.items()):
        try:
            check_shard(folder / name, shard, header, content=verify)
        except InputError:
            del shards[name]
    return shards
