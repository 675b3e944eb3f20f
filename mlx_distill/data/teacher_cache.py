"""A teacher's distributions on disk, so that teacher and student need not be in memory together.

Of every text and each of its positions the k most probable next tokens are kept, their
log-probabilities at temperature 1, and the mass of all other tokens, the tail. A folder holds
``manifest.json`` and a safetensors file per ``texts_per_shard`` texts, here of 3 and 2 positions::

    ids        5 x k  uint16, or uint32 if the vocabulary needs it
    log_probs  5 x k  float16, most probable first
    tail       5      float32
    offsets    0 3 5  int64; text i has the positions offsets[i] to offsets[i + 1]

That is 260 or 388 bytes per token at k = 64. The teacher itself is the caller's business.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt32

from mlx_distill.data.texts import Text, text_batch
from mlx_distill.errors import InputError, not_numbers, one_line
from mlx_distill.files import check_safetensors, read_json, write_whole

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WRITING = "writing.safetensors"
MAX_LOADED = 8

AGAIN = "running the same --cache-teacher command again"
MADE = {
    "tokenizer_hash": "with another tokenizer, so its token ids mean other tokens",
    "weights_hash": "from another teacher",
    "texts_hash": "of other texts, or of the same ones cut or ordered otherwise",
}
TAILS = ("bucket", "draws")
DTYPES = {"U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32, "I64": np.int64}


@dataclass(frozen=True)
class Shard:
    """One file of a cache, as the manifest lists it.

    Args:
        name: The file's.
        first: Its first text.
        count: Number of its texts.
        positions: Number of their positions.
        sha256: Of the file, in hexadecimal.
    """

    name: str
    first: int
    count: int
    positions: int
    sha256: str


class TeacherCache:
    """A finished cache of some texts; ``open`` makes one.

    Args:
        folder: Where it is.
        header: What the manifest says of it all.
        shards: Its files, in the order of the texts.
    """

    def __init__(self, folder: Path, header: dict[str, Any], shards: list[Shard]) -> None:
        self.folder = folder
        self.header = header
        self.shards = shards
        self.k: int = header["k"]
        self.vocab_size: int = header["vocab_size"]
        self._verified: set[int] = set()
        self._loaded: dict[int, dict[str, np.ndarray]] = {}  # the last one was used last

    @classmethod
    def open(cls, folder: Path, tokenizer_hash: str, texts: Sequence[Text]) -> "TeacherCache":
        """Return the cache of a folder, if it was made of these very texts.

        Raises:
            InputError: If there is none, it was made otherwise, is unfinished, or lacks a shard.
        """
        if not (folder / MANIFEST).exists():
            raise InputError(
                f"{folder} holds no {MANIFEST}, so it is no teacher's cache; "
                "make one with --cache-teacher"
            )
        header, shards = _read_manifest(folder)
        _check_made(
            folder,
            header,
            {"tokenizer_hash": tokenizer_hash, "texts_hash": texts_hash(texts)},
            "give the model, the data and the options that it was made with, or cache the teacher "
            "again into another folder",
        )
        done = sum(shard.count for shard in shards.values())
        if done < len(texts):
            raise InputError(
                f"{folder} is unfinished: it holds {done} of {len(texts)} texts; {AGAIN} goes on "
                "after them"
            )
        for name in shards:
            _check_shard(folder / name)
        return cls(folder, header, list(shards.values()))

    @property
    def bytes_per_token(self) -> float:
        """Size of the shards over the number of positions."""
        size = sum((self.folder / shard.name).stat().st_size for shard in self.shards)
        return size / sum(shard.positions for shard in self.shards)

    def batch(
        self, rows: Sequence[int], width: int
    ) -> tuple[Int32[mx.array, "B T K"], Float32[mx.array, "B T K"]]:
        """Return the top tokens of some texts and their log-probabilities, for a padded batch.

        Padding holds the tokens 0 to K - 1 of a uniform distribution.

        Args:
            rows: Which texts.
            width: Number of inputs; longer texts are cut.

        Raises:
            InputError: If a shard is missing or damaged.
        """
        first = np.arange(self.k, dtype=np.int32)
        ids = np.tile(first, (len(rows), width, 1))
        log_probs = np.full(ids.shape, -math.log(self.vocab_size), np.float32)
        for place, row in enumerate(rows):
            index, within = divmod(row, self.header["texts_per_shard"])
            arrays = self._load(index)
            start, stop = arrays["offsets"][within : within + 2]
            some = slice(start, min(stop, start + width))
            num_positions = some.stop - some.start
            ids[place, :num_positions] = arrays["ids"][some]
            log_probs[place, :num_positions] = _rescale(
                arrays["log_probs"][some], arrays["tail"][some]
            )
        return mx.array(ids), mx.array(log_probs)

    def _load(self, index: int) -> dict[str, np.ndarray]:
        """Return the arrays of a shard; its content is checked when it is read first."""
        arrays = self._loaded.pop(index, None)
        if arrays is None:
            shard = self.shards[index]
            path = self.folder / shard.name
            _check_shard(path, None if index in self._verified else shard.sha256)
            self._verified.add(index)
            arrays = _map_arrays(path)
            if len(self._loaded) == MAX_LOADED:
                del self._loaded[next(iter(self._loaded))]
        self._loaded[index] = arrays
        return arrays


def write_cache(
    folder: Path,
    logits_of: Callable[[mx.array], mx.array],
    texts: Sequence[Text],
    header: dict[str, Any],
    k: int = 64,
    texts_per_shard: int = 256,
    batch_size: int = 8,
    verify: bool = True,
    tail: str = "bucket",
) -> Iterator[int]:
    """Ask a teacher about all texts and yield how many are done, after each batch.

    What is whole stays; what a kill, a full disk or a power cut left out is made now. The texts of
    a shard are kept once it is whole, so a kill loses less than ``texts_per_shard`` of them.

    Args:
        folder: It is created, or continued.
        logits_of: From token ids, (B, T), to the logits of what follows, (B, T, V).
        texts: Of two tokens or more, in the order in which ``TeacherCache.open`` will meet them.
        header: What the cache was made with: ``tokenizer_hash``, ``weights_hash``, ``vocab_size``.
        k: How many tokens to keep per position; at most the vocabulary.
        texts_per_shard: How many texts a file holds.
        batch_size: How many texts the teacher reads at once.
        verify: Read the shards that are there and rebuild those whose content has changed; without
            it only those of a wrong size are found.
        tail: "bucket" keeps the k most probable tokens and the mass of the others; "draws" keeps
            half as many, and draws from the others (see ``tail_draws``).

    Raises:
        InputError: If the folder holds a cache that was made otherwise, it cannot be written, or
            the teacher's logits are not numbers.
    """
    for name, value in (("k", k), ("texts_per_shard", texts_per_shard), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if tail not in TAILS:
        raise InputError(f"tail must be {' or '.join(TAILS)}, got {tail}")
    k = min(k, header["vocab_size"])
    if tail == "draws" and not 2 <= k < header["vocab_size"]:
        raise InputError(f"draws need at least 2 tokens and fewer than all, got {k}")
    header = {
        "format_version": FORMAT_VERSION,
        **json.loads(json.dumps(header)),
        "texts_hash": texts_hash(texts),
        "num_texts": len(texts),
        "k": k,
        "tail": tail,
        "texts_per_shard": texts_per_shard,
    }
    shards = _whole_shards(folder, header, verify)
    _write_manifest(folder, header, shards)
    done = sum(shard.count for shard in shards.values())
    for first in range(0, len(texts), texts_per_shard):
        name = _shard_name(first // texts_per_shard)
        if name in shards:
            continue
        rows = range(first, min(first + texts_per_shard, len(texts)))
        # Texts of similar length come together, so little is padded; they are stored in order.
        order = sorted(rows, key=lambda row: len(texts[row].tokens))
        answers: dict[int, list[np.ndarray]] = {}
        for at in range(0, len(order), batch_size):
            if at:
                yield done + at
            some = order[at : at + batch_size]
            answers.update(_ask(logits_of, texts, some, header))
        shard = _write_shard(folder, name, [answers[row] for row in rows], first, header, shards)
        shards[name] = shard
        _write_manifest(folder, header, shards)
        done += len(rows)
        yield done


def texts_hash(texts: Sequence[Text]) -> str:
    """Return the SHA-256 of the texts' token ids and of what is learned of them, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.array([len(text.tokens), *text.tokens, *text.learned], "<i8").tobytes())
    return digest.hexdigest()


def top_tokens(
    logits: Float[mx.array, "T V"], k: int
) -> tuple[UInt32[mx.array, "T K"], Float32[mx.array, "T K"], Float32[mx.array, " T"]]:
    """Return the k most probable tokens, their log-probabilities, and the mass of all others."""
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    least = logits.shape[-1] - k
    ids = mx.argpartition(logits, least, axis=-1)[..., least:]
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    top = mx.take_along_axis(logits, ids, axis=-1)
    # Summed over the others, not one minus the top: a small tail would be rounding alone.
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    tail = _sum_of_many(mx.exp(others))
    mass = mx.exp(top).sum(axis=-1) + tail
    return ids, top - mx.log(mass)[..., None], tail / mass


def tail_draws(logits: Float[mx.array, "T V"], k: int, key: mx.array) -> Float32[mx.array, "T V"]:
    """Return logits of which no more than ``k`` are finite, with the same softmax in expectation.

    The ``k`` // 2 most probable tokens keep their probability. The mass of all others goes, in
    equal parts, to the rest of ``k`` draws from them: systematic ones, so that a token gets
    within one part of its share. A bucket says nothing of its tokens; draws do, on average.

    Source:
        Anshumann et al. 2025 (sparse logit sampling), arXiv:2503.16870, where all are draws.
    """
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    num_top, num_draws = k // 2, k - k // 2
    least = mx.partition(log_probs, -num_top, axis=-1)[..., -num_top, None]
    tail = mx.where(log_probs < least, mx.exp(log_probs), 0)
    upto = mx.cumsum(tail, axis=-1)
    mass = upto[..., -1:]
    start = mx.random.uniform(shape=mass.shape, key=key)
    passed = mx.floor(upto / mx.maximum(mass, 1e-30) * num_draws + start)
    counts = passed - mx.concatenate([mx.zeros_like(mass), passed[..., :-1]], axis=-1)
    drawn = mx.where(counts > 0, mx.log(counts * mass / num_draws), -mx.inf)
    return mx.where(log_probs < least, drawn, log_probs)


def _sum_of_many(x: Float32[mx.array, "T V"]) -> Float32[mx.array, " T"]:
    """Return the sum of every row, in two steps.

    In one, MLX's float32 sum of 70,000 values is off by 1e-4 on a CPU; in two by 6e-7.
    """
    x = mx.pad(x, [(0, 0), (0, -x.shape[-1] % 256)])
    return x.reshape(len(x), -1, 256).sum(axis=-1).sum(axis=-1)


def _ask(
    logits_of: Callable[[mx.array], mx.array],
    texts: Sequence[Text],
    rows: Sequence[int],
    header: dict[str, Any],
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield ids, log-probabilities and tails of some texts, each behind its row."""
    k, vocab_size = header["k"], header["vocab_size"]
    logits = logits_of(text_batch(texts, rows).inputs)
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"the header's vocab_size is {vocab_size}, the logits' {logits.shape[-1]}")
    kinds = (np.uint16 if vocab_size <= 2**16 else np.uint32, np.float16, np.float32)
    for place, row in enumerate(rows):
        # One text at a time: in float32 a whole batch of a large vocabulary takes gigabytes.
        said = logits[place, : len(texts[row].tokens) - 1]
        if header["tail"] == "draws":
            said = tail_draws(said, k, mx.random.key(row))
        arrays = top_tokens(said, k)
        mx.eval(arrays)
        if mx.isnan(arrays[1]).any().item():
            raise not_numbers(f"in text {row}")
        yield row, [np.array(x).astype(kind) for x, kind in zip(arrays, kinds, strict=True)]


def _rescale(log_probs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Return the log-probabilities in float32 such that they and the tail sum to one.

    Float16 is off by up to 0.4 % of a probability. That would be the tail's error, too, if it were
    taken as what is missing to one, and a tail can be smaller than that.
    """
    known = log_probs.astype(np.float64)
    mass = np.exp(known).sum(axis=-1)
    return (known + np.log((1 - tail.astype(np.float64)) / mass)[..., None]).astype(np.float32)


def _write_shard(
    folder: Path,
    name: str,
    answers: Sequence[list[np.ndarray]],
    first: int,
    header: dict[str, Any],
    shards: dict[str, Shard],
) -> Shard:
    """Write one shard: whole under its name, or not there at all."""
    offsets = np.cumsum([0, *(len(tail) for _, _, tail in answers)], dtype=np.int64)
    columns = zip(("ids", "log_probs", "tail"), zip(*answers, strict=True), strict=True)
    arrays = {column: mx.array(np.concatenate(parts)) for column, parts in columns}
    writing = folder / WRITING
    try:
        mx.save_safetensors(str(writing), {**arrays, "offsets": mx.array(offsets)})
        check_safetensors(writing)
        sha256 = _sha256(writing)
        os.replace(writing, folder / name)
    except (OSError, RuntimeError, InputError) as error:
        writing.unlink(missing_ok=True)
        raise _not_written(folder / name, error, header, shards) from None
    return Shard(name, first, len(answers), int(offsets[-1]), sha256)


def _write_manifest(folder: Path, header: dict[str, Any], shards: dict[str, Shard]) -> None:
    listed = [asdict(shards[name]) for name in sorted(shards)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MANIFEST, json.dumps({**header, "shards": listed}, indent=2) + "\n")
    except OSError as error:
        raise _not_written(folder / MANIFEST, error, header, shards) from None


def _not_written(
    path: Path, error: Exception, header: dict[str, Any], shards: dict[str, Shard]
) -> InputError:
    done = sum(shard.count for shard in shards.values())
    return InputError(
        f"{path} could not be written ({one_line(error)}); {done} of {header['num_texts']} texts "
        f"are kept, and {AGAIN} goes on after them"
    )


def _whole_shards(folder: Path, header: dict[str, Any], verify: bool) -> dict[str, Shard]:
    """Return the shards of a folder that need not be made again."""
    if not (folder / MANIFEST).exists():
        return {}
    found, shards = _read_manifest(folder)
    _check_made(folder, found, header, "remove it or name another folder")
    for name, shard in list(shards.items()):
        try:
            _check_shard(folder / name, shard.sha256 if verify else None)
        except InputError:
            del shards[name]
    return shards


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Shard]]:
    """Return what a manifest says of the whole cache, and its shards in the order of the texts."""
    path = folder / MANIFEST
    header = read_json(path)
    if header.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {header.get('format_version')}, expected "
            f"{FORMAT_VERSION}; remove the folder and cache the teacher again"
        )
    try:
        numbers = [header[name] for name in ("k", "vocab_size", "num_texts", "texts_per_shard")]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError
        shards = {entry["name"]: Shard(**entry) for entry in header.pop("shards")}
        names = map(_shard_name, range(-(-header["num_texts"] // header["texts_per_shard"])))
        return header, {name: shards[name] for name in names if name in shards}
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is damaged; remove the folder and cache the teacher again"
        ) from None


def _check_made(folder: Path, found: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    """Raise InputError if a cache was made otherwise than is wanted."""
    for name, value in wanted.items():
        if found.get(name) != value:
            how = MADE.get(name, f"with {name} {found.get(name)}, not {value}")
            raise InputError(f"{folder} was made {how}; {remedy}")


def _check_shard(path: Path, sha256: str | None = None) -> None:
    """Raise InputError if a shard is missing, of a wrong size, or of another content."""
    try:
        check_safetensors(path)
        if sha256 is not None and _sha256(path) != sha256:
            raise InputError(f"{path} is damaged: its content has changed since it was written")
    except (InputError, OSError) as error:
        raise InputError(f"{error}; {AGAIN} rebuilds this file alone") from None


def _map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, mapped.

    A shuffled batch takes its texts from as many shards: only what it needs of them is read.
    """
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    fields = json.loads(data[8:start].tobytes())
    fields.pop("__metadata__", None)
    arrays = {}
    for name, field in fields.items():
        begin, end = (start + offset for offset in field["data_offsets"])
        arrays[name] = data[begin:end].view(DTYPES[field["dtype"]]).reshape(field["shape"])
    return arrays


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"
