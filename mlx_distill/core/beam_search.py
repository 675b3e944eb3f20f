"""Beam search over a recurrent drafter, all on the device, in one graph.

On a GPU every operation costs, however small it is, so the search has few: what belongs to a level
stays as it is found, and all levels are put into one array by one chain of selections at the end,
which a compiled search fuses. The root has a level of its own, of which the last node is kept:

    level 0   root root root        nodes   root | A B C | D E F
    level 1    A    B    C
    level 2    D    E    F
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int, Integer, UInt32
from mlx.utils import tree_map

from mlx_distill.core.draft import WORST_SCORE, Draft
from mlx_distill.kernels.beam_step import (
    MOST_COST,
    NATS,
    beam_step,
    beams_of,
    best_of,
    costs_of,
    token_bits,
    tokens_of,
)


class Listed(NamedTuple):
    """Logits of some tokens alone; no others are drafted.

    Args:
        logits: Of the listed tokens, as many for every beam.
        tokens: Which they are.
        total: Logarithm of the sum over all tokens' exponentials; None if those that are not
            listed are impossible.
    """

    logits: Float[mx.array, "W C"]
    tokens: Integer[mx.array, "W C"]
    total: Float[mx.array, "W 1"] | None = None


Step = Callable[[Int[mx.array, " W"], Any], tuple[Float[mx.array, "W V"] | Listed, Any]]

# Tokens, parents and scores, a row for each level; that of the root has the root in every place.
# Of the last axis tokens and parents are the first, scores the second.
Levels: TypeAlias = tuple[
    Int[mx.array, "L W 2"],
    Int[mx.array, "L W 2"],
    Float[mx.array, "L W 2"],
]

# Up to so many beams are told apart by selections, which fuse, and not by a gather.
FEW_BEAMS = 8


def beam_search(
    step: Step,
    root: Int[mx.array, " 1"],
    state: Any,
    width: int,
    length: int,
    token_ids: Int[mx.array, " V"] | None = None,
    num_tokens: int = 2**20,
) -> Draft:
    """Return the ``width`` most probable continuations of the root at each of ``length`` depths.

    Node 0 of the draft is the root; the nodes of a depth follow those of the depth before. The
    arguments are those of ``beam_levels``.
    """
    return in_nodes(beam_levels(step, root, state, width, length, token_ids, num_tokens))


def beam_levels(
    step: Step,
    root: Int[mx.array, " 1"],
    state: Any,
    width: int,
    length: int,
    token_ids: Int[mx.array, " V"] | None = None,
    num_tokens: int = 2**20,
) -> Levels:
    """Return the same as rows, a level each: what a compiled search returns, since it fuses.

    Args:
        step: Takes the beams' last tokens and their states, each with the beams on its first axis;
            returns the logits of the next tokens, in float32, and the new states. The logits may
            be those of a list of tokens, if they always are, of as many.
        root: The token that every beam begins with.
        state: The drafter's state before the root, for one beam.
        width: Number of beams, at least 1; capped at the number of tokens there are.
        length: Number of drafted tokens per beam, at least 1.
        token_ids: What the columns of the logits stand for; None if they are the token ids.
        num_tokens: Above every token that is drafted.
    """
    levels: list[UInt32[mx.array, "W 2"]] = []
    tokens, above, bits = root, None, token_bits(num_tokens)
    for _ in range(length):
        found, state = step(tokens, state)
        logits = found.logits if isinstance(found, Listed) else found
        width = min(width, logits.shape[-1])
        levels.append(_best(found, above, token_ids, width, bits))
        tokens, above = tokens_of(levels[-1], bits), costs_of(levels[-1])[:, None]
        beams = beams_of(levels[-1], bits) if len(levels) > 1 else None
        state = tree_map(partial(_chosen, beams, width), state)
    return _in_rows(root, levels, bits)


def _best(
    found: Float[mx.array, "W V"] | Listed,
    above: UInt32[mx.array, "W 1"] | None,
    token_ids: Int[mx.array, " V"] | None,
    width: int,
    bits: int,
) -> UInt32[mx.array, "K 2"]:
    """Return the best continuations of beams that cost so much; None for the root."""
    if not isinstance(found, Listed):
        every = np.arange(found.shape[-1])
        tokens = mx.array(every) if token_ids is None else token_ids
        return beam_step(found, above, tokens[None], width, bits)
    if found.total is None:
        return beam_step(found.logits, above, found.tokens, width, bits)
    return best_of(found.logits, found.total, above, found.tokens, width, bits)


def _in_rows(
    root: Int[mx.array, " 1"], levels: Sequence[UInt32[mx.array, "W 2"]], bits: int
) -> Levels:
    """Return the rows of all levels by one fused operation; of a word's lanes each has one.

    A fused operation has several results where one is made of the others, as here the scores are
    of the tokens and the parents.
    """
    width, length = levels[0].shape[0], len(levels)
    level = mx.array([[[number]] for number in range(length + 1)])
    above = [0, 0, *(1 + width * level for level in range(length - 1))]
    first = mx.array([[[nodes]] for nodes in above], mx.uint32)
    nothing = mx.array([[[0]]], mx.uint32)
    words = _selected(level, [nothing, *(x[None] for x in levels)], 0)
    tokens = mx.where(level == 0, root.astype(mx.uint32), words & (2**bits - 1)).astype(mx.int32)
    parents = ((words >> bits) + first).astype(mx.int32)
    possible = (words < MOST_COST) & (tokens >= 0) & (parents >= 0)
    scores = mx.where(possible, words.astype(mx.float32) * (-1 / NATS), WORST_SCORE)
    return tokens, parents, scores


def in_nodes(levels: Levels) -> Draft:
    """Return the draft of all levels."""
    rows, width, _ = levels[0].shape
    lanes = zip(levels, (0, 0, 1), strict=True)
    tokens, parents, scores = (x[..., lane].reshape(-1)[width - 1 :] for x, lane in lanes)
    depths = mx.array([0] + [depth for depth in range(1, rows) for _ in range(width)])
    return Draft(tokens, parents, depths, scores, rows - 1)


def _selected(
    level: Int[mx.array, "L 1 1"], words: Sequence[UInt32[mx.array, "1 _ _"]], start: int
) -> UInt32[mx.array, "..."]:
    """Return the words of consecutive levels in one array, by halves: MLX fuses up to a depth."""
    if len(words) == 1:
        return words[0]
    half = len(words) // 2
    lower, upper = words[:half], words[half:]
    middle = start + half
    return mx.where(level < middle, _selected(level, lower, start), _selected(level, upper, middle))


def _chosen(beams: Integer[mx.array, " W"] | None, width: int, x: mx.array) -> mx.array:
    """Return the rows of the beams that are continued; of the only one where there is one."""
    if beams is None or x.shape[0] == 1:
        return mx.broadcast_to(x[:1], (width, *x.shape[1:]))
    if x.shape[0] > FEW_BEAMS:
        return x[beams]
    parents = beams.reshape(-1, *[1] * (x.ndim - 1))
    chosen = x[:1]
    for row in range(1, x.shape[0]):
        chosen = mx.where(parents == row, x[row : row + 1], chosen)
    return mx.broadcast_to(chosen, x.shape)
