"""Beam searches from many roots at once: what ``beam_search`` does for one, in wide products.

Judging and training ask for drafts at every token of texts that are known. One matrix product for
all of them costs a fraction of as many small ones; on a processor the head's weights are then read
once, and not once a root. Decoding has one root and wants few operations: it has its own search.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int, Integer
from mlx.utils import tree_map

from mlx_distill.arrays import log_probs
from mlx_distill.core.draft import WORST_SCORE, Draft
from mlx_distill.kernels.exponentials import by_powers, log_sum_exp

# Takes the last tokens of all beams and their states, beams on the first axis; returns logits in
# float32 and new states. Before the first tokens, the state is None.
Step = Callable[[Int[mx.array, " R"], Any], tuple[Float[mx.array, "R V"], Any]]

# The largest values of a row lie in the parts of it whose largest ones are the largest.
PART = 128


def beam_searches(
    step: Step, roots: Int[mx.array, " S"], width: int, length: int, lazily: bool = False
) -> Draft:
    """Return the drafts of many roots, as ``beam_search`` makes them one by one.

    The fields of the draft have an axis in front, of the roots; its tokens, but for the roots, are
    columns of the logits.

    Args:
        step: Advances the beams of all roots, one root's after the other's.
        roots: The tokens that are certain.
        width: Number of beams of each root, at least 1; capped at the number of columns.
        length: Number of drafted tokens per beam, at least 1.
        lazily: Whether nothing is computed yet, as a few texts' decoding wants it.
    """
    logits, state = step(roots, None)
    num_roots, num_columns = logits.shape
    width = min(width, num_columns)
    state = tree_map(lambda x: mx.repeat(x, width, axis=0), state)
    best, scores = top_values(_log_probs(logits), width)
    levels = [(roots[:, None], mx.zeros_like(roots[:, None]), mx.zeros((num_roots, 1)))]
    levels.append((best, mx.zeros_like(best), scores))
    for depth in range(1, length):
        logits, state = step((best % num_columns).reshape(-1), state)
        paths = _log_probs(logits).reshape(num_roots, width, -1) + scores[..., None]
        best, scores = top_values(paths.reshape(num_roots, -1), width)
        above = best // num_columns
        rows = (mx.arange(num_roots)[:, None] * width + above).reshape(-1)
        state = tree_map(partial(mx.take, indices=rows, axis=0), state)
        levels.append((best % num_columns, above + 1 + width * (depth - 1), scores))
        if not lazily:
            mx.eval(state, levels[-1])  # a level's logits are many
    tokens, parents, found = (
        mx.concatenate([x.astype(kind) for x in part], axis=1)
        for part, kind in zip(
            zip(*levels, strict=True), (mx.int32, mx.int32, mx.float32), strict=True
        )
    )
    depths = mx.array([0] + [depth for depth in range(1, length + 1) for _ in range(width)])
    depths = mx.broadcast_to(depths, tokens.shape)
    return Draft(tokens, parents, depths, mx.maximum(found, WORST_SCORE), length)


def _log_probs(logits: Float[mx.array, "R V"]) -> Float[mx.array, "R V"]:
    return logits - log_sum_exp(logits) if by_powers() else log_probs(logits)


def top_values(
    values: Float[mx.array, "S V"], count: int
) -> tuple[Integer[mx.array, "S K"], Float[mx.array, "S K"]]:
    """Return where the ``count`` largest values of each row are, in no order, and the values."""
    places = _top_places(values, count)
    return places, mx.take_along_axis(values, places, axis=1)


def _top_places(values: Float[mx.array, "S V"], count: int) -> Integer[mx.array, "S K"]:
    width = values.shape[1]
    if count == width:
        return mx.broadcast_to(mx.arange(width), values.shape)
    if width % PART or width // PART <= count:
        return mx.argpartition(values, kth=width - count, axis=1)[:, width - count :]
    parts = values.reshape(values.shape[0], -1, PART)
    best = _top_places(parts.max(axis=-1), count)
    some = mx.take_along_axis(parts, best[..., None], axis=1).reshape(values.shape[0], -1)
    found = _top_places(some, count)
    return mx.take_along_axis(best, found // PART, axis=1) * PART + found % PART
