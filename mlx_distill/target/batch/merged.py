"""Several texts in mlx-lm's own caches, merged into one of all: what ``answer_batch`` writes with.

    text 1   a b c d e      read together, padded behind; what is padded is rolled to the front
    text 2   x y . . .

Not every model of mlx-lm takes that. Some end in an error: their masks have no axis for the texts,
or their positions are one number. Others take the padding for text, as Mamba's states do, and say
something else than of a text alone. Which ones is found by trying, once.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.opening import FLOOR, PLACED_BY_SLOT, ROOM, rms_difference
from mlx_distill.target.reading import read_whole, vocab_width

READ_TOKENS = 16384  # of the prompts that begin together, that are read at once

# What is read to try a model, in shares of the vocabulary; see ``opening``.
_TEXTS = ((0.13, 0.48), (0.74, 0.22, 0.83, 0.09, 0.57, 0.31))


def takes_merged(model: nn.Module) -> bool:
    """Return whether a model says of texts in merged caches what it says of each alone."""
    known: bool | None = model.__dict__.get("_mlx_distill_merged")
    if known is None:
        try:
            known = getattr(model, "model_type", None) not in PLACED_BY_SLOT and _agrees(model)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            known = False
        object.__setattr__(model, "_mlx_distill_merged", known)
    return known


def read_merged(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[LayerCache]:
    """Return merged caches that hold all of the texts but their last tokens."""
    single = [make_prompt_cache(model) for _ in texts]
    caches = [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]
    lengths = [len(text) - 1 for text in texts]
    width = max(lengths)
    padding = [width - length for length in lengths]
    ids = np.zeros((len(texts), width), np.uint32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    for cache in caches if any(padding) else ():
        cache.prepare(lengths=lengths, right_padding=padding)
    _read(model, ids, caches)
    for cache in caches if any(padding) else ():
        cache.finalize()
        mx.eval(cache.state)
    return caches


def read_alone(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[LayerCache]:
    """Return the caches that mlx-lm makes of one text; they hold all of it but its last token."""
    (text,) = texts
    caches = make_prompt_cache(model)
    _read(model, np.array([text[:-1]], np.uint32), caches)
    return caches


def _read(model: nn.Module, ids: np.ndarray, caches: list[LayerCache]) -> None:
    size = max(1, READ_TOKENS // len(ids))
    for start in range(0, ids.shape[1], size):
        model(mx.array(ids[:, start : start + size]), cache=caches)
        mx.eval([cache.state for cache in caches])


def _agrees(model: nn.Module) -> bool:
    """Read two texts together; then go on with one of them, beside the other read anew."""
    size = vocab_width(model)
    short, long = ([int(share * size) for share in row] for row in _TEXTS)
    caches = read_merged(model, [short, long])
    first = model(mx.array([short[-1:], long[-1:]]), cache=caches)[:, -1]
    more = read_merged(model, [long])
    for cache, new in zip(caches, more, strict=True):
        cache.filter(mx.array([0]))
        cache.extend(new)
    after = model(mx.array([short[:1], long[-1:]]), cache=caches)[:, -1]
    of_short, of_long, of_more = (
        read_whole(model, mx.array([text]))[0, -1] for text in (short, long, [*short, short[0]])
    )
    return all(
        _is(found, right, wrong)
        for found, right, wrong in (
            (first[0], of_short, of_long),
            (first[1], of_long, of_short),
            (after[0], of_more, of_long),
            (after[1], of_long, of_more),
        )
    )


def _is(found: mx.array, right: mx.array, wrong: mx.array) -> bool:
    """Return whether logits are the right ones, up to rounding, and far from the wrong ones."""
    error = rms_difference(found, right)
    return error <= FLOOR.get(right.dtype, 0.3) and ROOM * error <= rms_difference(found, wrong)
