"""Small caches of a teacher's answers, and the slow twin of what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.teacher_cache import TeacherCache, write_cache
from mlx_distill.data.texts import Text, text_batch

V = 300


HEADER = {"tokenizer_hash": "abc", "weights_hash": "def", "vocab_size": V}


HALF = 2**-8 + 1e-3  # half of float16's step below 16, and what rescaling adds


def make_texts(count: int, seed: int = 0, vocab_size: int = V) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = [2, 40, *random.integers(2, 41, count - 2).tolist()]
    return [Text.behind(random.integers(0, vocab_size, n).tolist(), 1 + n // 4) for n in lengths]


def make_teacher(vocab_size: int = V, scale: float = 3.0) -> Callable[[mx.array], mx.array]:
    """Return a teacher that sees the last token only."""
    if vocab_size > V:  # its table would be large: every row is a rotation of one
        row = mx.array(np.random.default_rng(1).normal(0, scale, vocab_size).astype(np.float32))
        places = mx.arange(vocab_size)
        return lambda inputs: row[(places + 7 * inputs[..., None]) % vocab_size]
    table = np.random.default_rng(1).normal(0, scale, (vocab_size, vocab_size))
    weights = mx.array(table.astype(np.float32))
    return lambda inputs: weights[inputs]


class Speaker:
    """A teacher that reads token ids and makes logits of them by a function."""

    def __init__(self, logits_of: Callable[[mx.array], mx.array]):
        self.logits_of = logits_of
        self.most_rows = 0

    def hidden(self, inputs: mx.array) -> mx.array:
        return inputs[..., None]

    def logits(self, hidden: mx.array) -> mx.array:
        assert hidden.ndim == 2
        self.most_rows = max(self.most_rows, len(hidden))
        return self.logits_of(hidden[:, 0])


TEXTS = make_texts(21)


TEACHER = make_teacher()


def write(folder: Path, **options: Any) -> list[int]:
    options = {"k": 8, "texts_per_shard": 5, "batch_size": 2, "header": HEADER, **options}
    texts = options.pop("texts", TEXTS)
    return list(write_cache(folder, Speaker(options.pop("teacher", TEACHER)), texts, **options))


def open_cache(folder: Path) -> TeacherCache:
    return TeacherCache.open(folder, "abc", TEXTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def oracle(text: Text, k: int, teacher: Callable[[mx.array], mx.array] = TEACHER) -> Any:
    """Return ids, log-probabilities and tail of each learned token, one by one, in float64."""
    for place in np.flatnonzero(text.learned):
        token = text.tokens[place - 1]
        logits = np.array(teacher(mx.array([[token]]))[0, 0]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        order = np.argsort(-log_probs, kind="stable")
        yield order[:k], log_probs[order[:k]], np.exp(log_probs[order[k:]]).sum()


def at_learned(cache: TeacherCache, rows: list[int]) -> tuple[mx.array, mx.array]:
    return cache.batch(rows, text_batch(TEXTS, rows).mask)


def learned_of(cache: TeacherCache, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what a cache says of the learned tokens of some texts, as a batch of one."""
    batch = text_batch(TEXTS, rows)
    at = np.array(batch.mask) > 0
    ids, log_probs = (np.array(x)[at][None] for x in cache.batch(rows, batch.mask))
    return ids, log_probs


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
