"""What a drafter learns: the target's distributions, along its own unrolled states.

For every token x_{t+1} of an answer that the target wrote, the drafter starts from the hidden state
h_t, reads x_{t+1}, x_{t+2}, ... and after each of them is asked for the next token; the target's
answer at that position is the goal. All starting points of a batch are unrolled at once:

    position       t        t+1       t+2       t+3
    target         h_t      p_{t+1}   p_{t+2}   p_{t+3}
    drafter reads           x_{t+1}   x_{t+2}   x_{t+3}
    loss                    KL(p_{t+1} || q_1) + 0.8 KL(p_{t+2} || q_2) + 0.64 KL(...) ...

Only the positions where the target chose a token are taken out of the texts, one row each; prompts
and padding end there. Logits exist for some rows at a time, the target's and the drafter's. A row
of the target's is the goal of drafts of every depth, so drafts are kept by their goal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.arrays import log_probs
from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.losses.chunked import chunk_rows, chunked_loss
from mlx_distill.losses.response import forward_kl


@dataclass(frozen=True)
class TargetView:
    """The positions at which the target chose a token; nothing in it has a gradient.

    Args:
        hidden: What its head saw there.
        embeddings: Of the tokens there.
        ahead: How many of the rows that follow belong to the same answer.
        goals: What ``head`` makes the target's logits of; mostly the hidden states.
        head: Makes them.
        token_ids: The tokens that can be drafted; None for all.
        rows: Of the data, that the answers are.
    """

    hidden: Float[mx.array, "N D"]
    embeddings: Float[mx.array, "N E"]
    ahead: Int[mx.array, " N"]
    goals: Float[mx.array, "N G"]
    head: Callable[[mx.array], mx.array]
    token_ids: Int[mx.array, " K"] | None = None
    rows: Sequence[int] = ()

    def log_probs(self, places: Int[mx.array, " C"]) -> Float[mx.array, "C K"]:
        """Return the target's distributions at some positions, over what can be drafted."""
        logits = self.head(self.goals[places])
        return log_probs(logits if self.token_ids is None else logits[..., self.token_ids])


def answer_places(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the target chose a token, and how many such places follow each in its answer.

    Args:
        mask: Of a ``TextBatch``, (B, T).

    Returns:
        Places in the flattened mask, in order, and counts. A text's last place is followed by none.
    """
    learned = mask > 0
    ahead = np.zeros(mask.shape, np.int32)
    for place in range(mask.shape[1] - 2, -1, -1):
        ahead[:, place] = np.where(learned[:, place + 1], ahead[:, place + 1] + 1, 0)
    places = np.flatnonzero(learned)
    return places.astype(np.int32), ahead.reshape(-1)[places]


def unroll(
    drafter: RecurrentDrafter, view: TargetView, length: int
) -> tuple[Float[mx.array, "N L E"], Float[mx.array, "N L"]]:
    """Return what the drafter's head is given, by goal and depth, and the mask of what there is.

    Entry (n, d - 1) is that of the draft which started d rows before the n-th, and has read the
    tokens from there to the n-th.
    """
    num_rows = view.hidden.shape[0]
    hidden, embeddings = map(mx.stop_gradient, (view.hidden, view.embeddings))
    context = drafter.context(hidden)
    read = mx.pad(drafter.read(embeddings), [(0, length), (0, 0)])
    state = None
    columns, masks = [], []
    for depth in range(1, length + 1):
        state = drafter.advance(state, read[depth : depth + num_rows])
        by_start = (drafter.features(context, state), view.ahead >= depth)
        features, there = (_later(array, depth) for array in by_start)
        columns.append(features)
        masks.append(there.astype(mx.float32))
    return mx.stack(columns, axis=1), mx.stack(masks, axis=1)


def _later(rows: mx.array, count: int) -> mx.array:
    """Return rows moved down; what moves in at the top is zero."""
    widths = [(count, 0), *[(0, 0)] * (rows.ndim - 1)]
    return mx.pad(rows, widths)[: rows.shape[0]]


def drafter_loss(
    drafter: RecurrentDrafter, view: TargetView, length: int, decay: float = 0.8
) -> tuple[mx.array, mx.array]:
    """Return the weighted sum of KL(target || drafter) over an unrolled draft, and its count.

    Args:
        drafter: The student.
        view: The target's view of a batch.
        length: Drafted tokens per start.
        decay: The i-th drafted token weighs ``decay ** (i - 1)``.
    """
    features, mask = unroll(drafter, view, length)
    weights = mask * decay ** mx.arange(length)
    places = mx.repeat(mx.arange(mask.shape[0]), length)

    def loss(logits: mx.array, places: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        goals = view.log_probs(places[::length])  # a goal is that of drafts of every depth
        goals, probs = (mx.repeat(x, length, axis=0) for x in (goals, mx.exp(goals)))
        return weighted_sum(forward_kl(logits, goals, probs), weights), weights.sum()

    flat = features.reshape(-1, features.shape[-1])
    size = length * goal_rows(drafter.head, length)
    return chunked_loss(drafter.head, flat, loss, (places, weights.reshape(-1)), size)


def goal_rows(head: nn.Linear, length: int) -> int:
    """Return how many goals a chunk of drafts has."""
    return max(1, chunk_rows(head["weight"].shape[0]) // length)


def acceptance_by_depth(
    drafter: RecurrentDrafter, view: TargetView, length: int
) -> tuple[Float[mx.array, "2 L"], Float[mx.array, " L"]]:
    """Return summed acceptances of a drafted chain by depth, and their counts.

    Row 0 counts greedy agreement: how often the drafter's best token is the target's best, where
    the text itself is what was drafted before. Row 1 sums the probability with which sampling at
    temperature 1 would take the drafter's best token.
    """
    features, mask = unroll(drafter, view, length)
    total = mx.zeros((2, length))
    size = goal_rows(drafter.head, length)
    for start in range(0, mask.shape[0], size):
        here = slice(start, start + size)
        probs = mx.exp(view.log_probs(mx.arange(mask.shape[0])[here]))
        best = mx.argmax(drafter.head(features[here]), axis=-1)
        agreed = best == mx.argmax(probs, axis=-1)[:, None]
        taken = mx.take_along_axis(probs, best, axis=-1)
        total += mx.stack([(kind * mask[here]).sum(axis=0) for kind in (agreed, taken)])
        mx.eval(total)  # one chunk at a time is in memory
    return total, mask.sum(axis=0)
