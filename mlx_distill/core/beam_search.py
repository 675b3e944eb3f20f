"""Beam search over a recurrent drafter, all on the device, in one graph."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int
from mlx.utils import tree_map

from mlx_distill.core.draft import Draft

Step = Callable[[Int[mx.array, " W"], Any], tuple[Float[mx.array, "W V"], Any]]


def beam_search(
    step: Step,
    root: Int[mx.array, " 1"],
    state: Any,
    width: int,
    length: int,
    token_ids: Int[mx.array, " V"] | None = None,
) -> Draft:
    """Return the ``width`` most probable continuations of the root at each of ``length`` depths.

    Node 0 of the draft is the root; the nodes of a depth follow those of the depth before.

    Args:
        step: Takes the beams' last tokens and their states, each with the beams on its first axis;
            returns the log-probabilities of the next tokens and the new states.
        root: The token that every beam begins with.
        state: The drafter's state before the root, for one beam.
        width: Number of beams, at least 1; capped at the number of tokens there are.
        length: Number of drafted tokens per beam, at least 1.
        token_ids: What the columns of ``log_probs`` stand for; None if they are the token ids.
    """
    log_probs, state = step(root, state)
    vocab_size = log_probs.shape[-1]
    width = min(width, vocab_size)
    state = tree_map(lambda x: mx.broadcast_to(x, (width, *x.shape[1:])), state)
    best = _top(log_probs[0], width)
    parents, scores = mx.zeros_like(best), log_probs[0][best]
    levels = [(root.astype(mx.int32), mx.zeros((1,), mx.int32), mx.zeros((1,)))]
    for depth in range(length):
        columns = best % vocab_size if depth else best
        tokens = columns if token_ids is None else token_ids[columns]
        above = 1 + (depth - 1) * width if depth else 0  # the index of the first node there
        levels.append((tokens.astype(mx.int32), parents.astype(mx.int32) + above, scores))
        if depth == length - 1:
            break
        log_probs, state = step(tokens, state)
        flat = (log_probs + scores[:, None]).reshape(-1)
        best = _top(flat, width)
        parents, scores = best // vocab_size, flat[best]
        state = tree_map(lambda x, kept=parents: x[kept], state)
    tokens, parents, scores = (mx.concatenate(list(part)) for part in zip(*levels, strict=True))
    depths = mx.concatenate([mx.zeros((1,), mx.int32), mx.arange(length * width) // width + 1])
    return Draft(tokens, parents, depths, scores, length)


def _top(scores: Float[mx.array, " V"], count: int) -> Int[mx.array, " K"]:
    """Return the indices of the ``count`` largest scores, in no order."""
    if count == scores.size:
        return mx.arange(count)
    order = mx.argpartition(scores, kth=scores.size - count)
    return order[scores.size - count :].astype(mx.int32)
