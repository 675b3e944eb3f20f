"""A teacher's distributions on disk, so that teacher and student need not be in memory together.

Of every learned token of every text the k most probable ones in its place are kept, their
log-probabilities at temperature 1, and the mass of all other tokens, the tail. A folder holds
``manifest.json`` and a safetensors file per ``texts_per_shard`` texts, here of 3 and 2 learned
tokens::

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32

from mlx_distill.data.cache_files import (
    AGAIN,
    FORMAT_VERSION,
    MANIFEST,
    TAILS,
    Shard,
    check_made,
    check_shard,
    check_values,
    manifest,
    map_arrays,
    read_manifest,
    sha256,
    shard_name,
    whole_shards,
)
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.data.top_tokens import rescaled, tail_draws, top_tokens
from mlx_distill.errors import InputError, not_numbers, one_line
from mlx_distill.files import check_safetensors, write_whole
from mlx_distill.limits import Count, OneOf, check_value
from mlx_distill.locks import locked

WRITING = "writing.safetensors"
LOCK = "lock"
MAX_LOADED = 8
CHUNK_BYTES = 2**25  # of logits in float32; finding the largest holds a few arrays of that size


@runtime_checkable
class Reader(Protocol):
    """A teacher as its cache needs it: logits of some rows, never of whole batches."""

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return hidden states, (B, T, D), of token ids, (B, T)."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits, (N, V), of some of them, (N, D)."""
        ...


class TeacherCache:
    """A finished cache of some texts; ``open`` makes one.

    Args:
        folder: Where it is.
        header: What the manifest says of it all.
        shards: Its files, in the order of the texts.
        texts: What it was made of.
    """

    def __init__(
        self, folder: Path, header: dict[str, Any], shards: list[Shard], texts: Sequence[Text]
    ) -> None:
        self.folder = folder
        self.header = header
        self.shards = shards
        self.k: int = header["k"]
        self.vocab_size: int = header["vocab_size"]
        self._counts = [text.num_learned for text in texts]
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
        header, shards = read_manifest(folder)
        check_made(
            folder,
            header,
            {
                "tokenizer_hash": tokenizer_hash,
                "texts_hash": texts_hash(texts),
                "num_texts": len(texts),
            },
            "give the model, the data and the options that it was made with, or cache the teacher "
            "again into another folder",
        )
        done = sum(shard.count for shard in shards.values())
        if done < len(texts):
            raise InputError(
                f"{folder} is unfinished: it holds {done} of {len(texts)} texts; {AGAIN} goes on "
                "after them"
            )
        for name, shard in shards.items():
            check_shard(folder / name, shard, header)
        return cls(folder, header, list(shards.values()), texts)

    @property
    def bytes_per_token(self) -> float:
        """Size of the shards over the number of positions."""
        size = sum((self.folder / shard.name).stat().st_size for shard in self.shards)
        return size / sum(shard.positions for shard in self.shards)

    @property
    def content_hash(self) -> str:
        """A hash of all that the cache holds, by those that its manifest has of the shards."""
        shards = [shard.sha256 for shard in self.shards]
        content = json.dumps([self.header, shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def batch(
        self, rows: Sequence[int], mask: Float[mx.array, "B T"]
    ) -> tuple[Int32[mx.array, "B T K"], Float32[mx.array, "B T K"]]:
        """Return the top tokens of some texts and their log-probabilities, for a padded batch.

        Where nothing is learned, they are the tokens 0 to K - 1 of a uniform distribution.

        Args:
            rows: Which texts.
            mask: Of the batch, 1 where the next token is learned; longer texts may be cut.

        Raises:
            InputError: If a shard is missing or damaged.
        """
        learned = np.array(mask) > 0
        first = np.arange(self.k, dtype=np.int32)
        ids = np.tile(first, (*learned.shape, 1))
        log_probs = np.full(ids.shape, -math.log(self.vocab_size), np.float32)
        for place, row in enumerate(rows):
            index, within = divmod(row, self.header["texts_per_shard"])
            arrays = self._load(index)
            start, stop = arrays["offsets"][within : within + 2]
            at = np.flatnonzero(learned[place])[: stop - start]
            some = slice(start, start + len(at))
            ids[place, at] = arrays["ids"][some]
            log_probs[place, at] = rescaled(arrays["log_probs"][some], arrays["tail"][some])
        return mx.array(ids), mx.array(log_probs)

    def _load(self, index: int) -> dict[str, np.ndarray]:
        """Return the arrays of a shard; its content is checked when it is read first."""
        arrays = self._loaded.pop(index, None)
        if arrays is None:
            shard = self.shards[index]
            path = self.folder / shard.name
            unread = index not in self._verified
            arrays = map_arrays(path, check_shard(path, shard, self.header, content=unread))
            if unread:
                counts = self._counts[shard.first : shard.first + shard.count]
                check_values(path, arrays, counts, self.vocab_size)
                self._verified.add(index)
            if len(self._loaded) == MAX_LOADED:
                del self._loaded[next(iter(self._loaded))]
        self._loaded[index] = arrays
        return arrays


def write_cache(
    folder: Path,
    teacher: Reader,
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
        teacher: Makes logits of some positions of what it has read.
        texts: In the order in which ``TeacherCache.open`` will meet them.
        header: What the cache was made with: ``tokenizer_hash``, ``weights_hash``, ``vocab_size``,
            and what else is to be the same for it to be gone on with.
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
        check_value(name, value, Count)
    OneOf(*TAILS).check("tail", tail)
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder / MANIFEST, error, header, {}) from None
    with locked(folder / LOCK, folder):
        yield from _write(folder, teacher, texts, header, batch_size, verify)


def _write(
    folder: Path,
    teacher: Reader,
    texts: Sequence[Text],
    header: dict[str, Any],
    batch_size: int,
    verify: bool,
) -> Iterator[int]:
    """Write what is not there yet; yield how many texts are done, after each batch."""
    texts_per_shard = header["texts_per_shard"]
    shards = whole_shards(folder, header, verify)
    _write_manifest(folder, header, shards)
    done = sum(shard.count for shard in shards.values())
    for first in range(0, len(texts), texts_per_shard):
        name = shard_name(first // texts_per_shard)
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
            answers.update(_ask(teacher, texts, some, header))
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


def _ask(
    teacher: Reader, texts: Sequence[Text], rows: Sequence[int], header: Mapping[str, Any]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield ids, log-probabilities and tails of some texts, each behind its row."""
    batch = text_batch(texts, rows, multiple=1)  # a model may have no position to pad up to
    hidden = teacher.hidden(batch.inputs)
    for place, row in enumerate(rows):
        learned = np.flatnonzero(texts[row].learned) - 1
        parts = list(_ask_rows(teacher, hidden[place][mx.array(learned)], row, header))
        yield row, [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _ask_rows(
    teacher: Reader, hidden: mx.array, row: int, header: Mapping[str, Any]
) -> Iterator[list[np.ndarray]]:
    """Yield ids, log-probabilities and tails of some positions of a text, a few at a time."""
    k, vocab_size = header["k"], header["vocab_size"]
    kinds = (np.uint16 if vocab_size <= 2**16 else np.uint32, np.float16, np.float32)
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    for part in range(0, max(1, len(hidden)), size):
        said = teacher.logits(hidden[part : part + size])
        if said.shape[-1] != vocab_size:
            raise ValueError(
                f"the header's vocab_size is {vocab_size}, the logits' {said.shape[-1]}"
            )
        if header["tail"] == "draws":
            said = tail_draws(said, k, mx.random.key(row * 2**24 + part))
        arrays = top_tokens(said, k)
        mx.eval(arrays)
        if mx.isnan(arrays[1]).any().item():
            raise not_numbers(f"in text {row}")
        yield [np.array(x).astype(kind) for x, kind in zip(arrays, kinds, strict=True)]


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
        digest = sha256(writing)
        os.replace(writing, folder / name)
    except (OSError, RuntimeError, InputError) as error:
        writing.unlink(missing_ok=True)
        raise _not_written(folder / name, error, header, shards) from None
    return Shard(name, first, len(answers), int(offsets[-1]), digest)


def _write_manifest(folder: Path, header: dict[str, Any], shards: dict[str, Shard]) -> None:
    try:
        write_whole(folder / MANIFEST, json.dumps(manifest(header, shards), indent=2) + "\n")
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
