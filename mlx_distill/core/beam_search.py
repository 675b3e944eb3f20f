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
from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int, Integer
from mlx.utils import tree_map

from mlx_distill.core.draft import WORST_SCORE, Draft
from mlx_distill.kernels.beam_step import Best, beam_step, top


class Listed(NamedTuple):
    """Logits of some columns alone; no others are drafted.

    Args:
        logits: Of the listed columns, as many for every beam.
        columns: Which they are.
        total: Logarithm of the sum over all columns' exponentials; None if those that are not
            listed are impossible.
    """

    logits: Float[mx.array, "W C"]
    columns: Integer[mx.array, "W C"]
    total: Float[mx.array, "W 1"] | None = None


Step = Callable[[Int[mx.array, " W"], Any], tuple[Float[mx.array, "W V"] | Listed, Any]]

# Up to so many beams are told apart by selections, which fuse, and not by a gather.
FEW_BEAMS = 8


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
            returns the logits of the next tokens, in float32, and the new states. The logits may
            be those of a list of columns, if they always are, of as many.
        root: The token that every beam begins with.
        state: The drafter's state before the root, for one beam.
        width: Number of beams, at least 1; capped at the number of tokens there are.
        length: Number of drafted tokens per beam, at least 1.
        token_ids: What the columns of the logits stand for; None if they are the token ids.
    """
    found, state = step(root, state)
    logits, listed, total = _parts(found)
    vocab_size = logits.shape[-1]
    width = min(width, vocab_size)
    state = tree_map(lambda x: mx.broadcast_to(x, (width, *x.shape[1:])), state)
    first = _best(logits, None, total, width)
    best, scores, shift = [first.places], [first.scores], first.shift
    names = [] if listed is None else [listed.reshape(-1)[best[0]]]
    for depth in range(1, length):
        columns = best[-1] % vocab_size if depth > 1 else best[-1]
        columns = names[-1] if names else columns
        found, state = step(columns if token_ids is None else token_ids[columns], state)
        logits, listed, total = _parts(found)
        # A view comes before what is computed, not behind it: so it all fuses.
        above = scores[-1][:, None]
        above = _shifted(above, shift) if depth == 1 else above
        found = _best(logits, above, total, width)
        best.append(found.places)
        scores.append(found.scores)
        names += [] if listed is None else [listed.reshape(-1)[best[-1]]]
        state = tree_map(partial(_chosen, best[-1], vocab_size), state)
    return _draft(root, best, names, scores, shift, vocab_size, token_ids)


def _parts(
    found: mx.array | Listed,
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Return logits, the columns that they are of (None for all), and their total, if given."""
    return found if isinstance(found, Listed) else (found, None, None)


def _best(
    logits: Float[mx.array, "W V"],
    above: Float[mx.array, "W 1"] | None,
    total: Float[mx.array, "W 1"] | None,
    width: int,
) -> Best:
    """Return the best continuations of beams with such scores; None for the root."""
    if total is None:
        return beam_step(logits, above, width)
    flat = (logits if above is None else logits - total + above).reshape(-1)
    places = top(flat, width)
    return Best(places, flat[places], total.reshape(-1) if above is None else None)


def _shifted(scores: mx.array, shift: mx.array | None) -> mx.array:
    return scores if shift is None else scores - shift


def _draft(
    root: Int[mx.array, " 1"],
    best: Sequence[Integer[mx.array, " W"]],
    names: Sequence[Integer[mx.array, " W"]],
    scores: Sequence[Float[mx.array, " W"]],
    shift: Float[mx.array, " 1"] | None,
    vocab_size: int,
    token_ids: Int[mx.array, " V"] | None,
) -> Draft:
    """Return the draft of all levels; tokens and parents come out of one chain of operations.

    The columns of the best are in ``names`` where those of the logits are listed.
    """
    width, length = best[0].size, len(best)
    is_root = mx.array([[True]] + [[False]] * length)
    above = mx.array([[0], [0], *([1 + width * level] for level in range(length - 1))], mx.uint32)
    found = _levels([x[None, None] for x in best], mx.array(0, mx.uint32))
    columns = found % vocab_size
    if names:
        columns = _levels([x[None, None] for x in names], mx.array(0, mx.uint32))
    if token_ids is None:
        columns = mx.where(is_root, root.astype(mx.uint32), columns)
    first = mx.array([True, False])[:, None, None]
    both = mx.where(first, columns, found // vocab_size + above).astype(mx.int32)
    tokens, parents = (x.reshape(-1)[width - 1 :] for x in (both[:1], both[1:]))
    if token_ids is not None:
        tokens = mx.where(mx.arange(tokens.size) == 0, root, token_ids[tokens])
    shifted = [_shifted(scores[0][None], shift), *(x[None] for x in scores[1:])]
    levels = mx.maximum(_levels(shifted, mx.array(0.0)), WORST_SCORE)
    depths = mx.array([0] + [depth for depth in range(1, length + 1) for _ in range(width)])
    return Draft(tokens.astype(mx.int32), parents, depths, levels.reshape(-1)[width - 1 :], length)


def _levels(values: Sequence[mx.array], root: mx.array) -> mx.array:
    """Return the values of all levels in one array, the root's in the first row.

    The values are rows; views between two operations would keep them from being one kernel.
    """
    level = mx.array([[number] for number in range(len(values) + 1)])
    rows = root
    for number, value in enumerate(values, start=1):
        rows = mx.where(level == number, value, rows)
    return rows


def _chosen(best: Integer[mx.array, " W"], vocab_size: int, x: mx.array) -> mx.array:
    """Return the rows of the beams that the best candidates follow."""
    if x.shape[0] > FEW_BEAMS:
        return x[best // vocab_size]
    parents = best.reshape(-1, *[1] * (x.ndim - 1)) // vocab_size
    chosen = x[:1]
    for row in range(1, x.shape[0]):
        chosen = mx.where(parents == row, x[row : row + 1], chosen)
    return mx.broadcast_to(chosen, x.shape)
