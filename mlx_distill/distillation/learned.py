"""The rows of a batch that something is learned of.

Of a chat a fourth of the tokens may be answers, of questions over long contexts a twentieth. Heads
are as wide as the vocabulary, so they are asked about those tokens alone.
"""

from typing import Any

import mlx.core as mx
import numpy as np

ROWS = 64  # their number is rounded up to a multiple, so that a GPU sees few shapes


def learned_rows(batch: Any, *arrays: mx.array) -> list[mx.array]:
    """Return labels, mask and further arrays of the learned positions alone, in rows.

    Args:
        batch: Of texts: labels and mask (B, T); or of examples, (B,), which are kept as they are.
        arrays: Further ones, whose leading axes are the labels'.

    Returns:
        Each (N, ...). Behind the learned rows there may be some of weight 0.
    """
    every = [batch.labels, batch.mask, *arrays]
    depth = batch.labels.ndim
    if depth == 1:
        return every
    mask = np.array(batch.mask, copy=False).reshape(-1)
    learned = np.flatnonzero(mask)
    # Those behind are of a learned position, too: what is infinite elsewhere has no gradient.
    first = learned[0] if len(learned) else 0
    places = np.full((max(1, -(-len(learned) // ROWS)) * ROWS,), first, np.int32)
    places[: len(learned)] = learned
    at, here = mx.array(places), mx.arange(len(places)) < len(learned)
    labels, weights, *others = (array.reshape(-1, *array.shape[depth:])[at] for array in every)
    return [labels, mx.where(here, weights, 0), *others]
