"""What a drafter learns: the target's distributions, along its own unrolled states.

For every token x_{t+1} of an answer that the target wrote, the drafter starts from the hidden state
h_t, reads x_{t+1}, x_{t+2}, ... and after each of them is asked for the next token; the target's
answer at that position is the goal:

    position       t        t+1       t+2       t+3
    target         h_t      p_{t+1}   p_{t+2}   p_{t+3}
    drafter reads           x_{t+1}   x_{t+2}   x_{t+3}
    loss                    KL(p_{t+1} || q_1) + 0.8 KL(p_{t+2} || q_2) + 0.64 KL(...) ...

In the divergence's place another loss may stand, one of ``DRAFT_LOSSES``.

Only the positions where the target chose a token are kept of the texts, one row each; prompts and
padding end there. Of these some are taken as starts, and unrolled together; logits exist for some
rows of them at a time, the target's and the drafter's.

A drafter with context blocks sees what was computed before a start, too: so the end of the prompt
is kept, and the blocks read the texts of a step once, for all starts in them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.arrays import log_probs
from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.distillation.own_samples import Own, still_drafted
from mlx_distill.drafters.networks import Network
from mlx_distill.drafters.recurrent import Past
from mlx_distill.losses.acceptance import likely_acceptance
from mlx_distill.losses.chunked import CHUNK_BYTES, chunk_rows, chunked_loss
from mlx_distill.losses.response import forward_kl

# Of a chunk's logits on a GPU, where every operation has a price of its own.
GPU_CHUNK_BYTES = 2**27
# Texts that context blocks read together have a multiple of so many rows: few shapes are compiled.
PAST_ROWS = 1024

Logits = Callable[[mx.array], mx.array]

# What a drafter can learn by, of its logits and the target's.
DRAFT_LOSSES = {"kl": forward_kl, "lk": likely_acceptance}


class Starts(NamedTuple):
    """Drafts to learn, and what the target says along them; nothing in it has a gradient.

    Args:
        hidden: What the target's head saw where a draft starts; with a past, at all of its rows.
        taps: What the tapped layers returned there.
        embeddings: Of the tokens that the draft reads.
        goals: What makes the target's logits behind each of them.
        mask: 1 where there is a goal; the answer may end before.
        past: What context blocks read; None without blocks.
        own: Where drafts go on with the drafter's own samples; None if they read the text.
    """

    hidden: Float[mx.array, "R D"]
    taps: list[mx.array]
    embeddings: Float[mx.array, "S L E"]
    goals: Float[mx.array, "S L G"]
    mask: Float[mx.array, "S L"]
    past: Past | None = None
    own: Own | None = None


@dataclass(frozen=True)
class TargetView:
    """The positions at which the target chose a token, in the order of the texts.

    Args:
        hidden: What its head saw there.
        tokens: What stands there.
        ahead: How many of the rows that follow belong to the same answer; -1 for the prompt's,
            where no draft starts.
        goals: What makes the target's logits; mostly the hidden states.
        embed: Makes embeddings of tokens.
        taps: What layers returned there.
    """

    hidden: Float[mx.array, "N D"]
    tokens: Int[mx.array, " N"]
    ahead: Int[mx.array, " N"]
    goals: Float[mx.array, "N G"]
    embed: Callable[[mx.array], mx.array]
    taps: tuple[Float[mx.array, "N _"], ...] = ()

    @cached_property
    def starting(self) -> Int[mx.array, " S"]:
        """The rows at which a draft can start: those that have one ahead."""
        ahead: np.ndarray = np.array(self.ahead)
        return mx.array(np.flatnonzero(ahead > 0).astype(np.int32))

    def starts(self, places: Int[mx.array, " S"], length: int, window: int = 0) -> Starts:
        """Return the drafts of ``length`` tokens that start at some rows.

        Args:
            places: The rows.
            length: Of the drafts.
            window: How many rows context blocks see; 0 without blocks.
        """
        there = places[:, None] + mx.arange(1, length + 1)
        mask = self.ahead[places][:, None] >= mx.arange(1, length + 1)
        there = mx.minimum(there, self.tokens.size - 1)  # what is behind the last does not count
        embeddings = self.embed(self.tokens[there])
        goals = self.goals[there]
        rows, past = self._past(places, window) if window else (places, None)
        taps = [tap[rows] for tap in self.taps]
        return Starts(self.hidden[rows], taps, embeddings, goals, mask.astype(mx.float32), past)

    def chosen(self, places: Int[mx.array, " S"], length: int) -> Int[mx.array, "S L"]:
        """Return what the target chose behind each token of drafts that start at some rows."""
        there = places[:, None] + mx.arange(2, length + 2)
        return self.tokens[mx.minimum(there, self.tokens.size - 1)]

    def _past(self, places: Int[mx.array, " S"], window: int) -> tuple[Int[mx.array, " R"], Past]:
        """Return the rows that a window before some rows reaches, and what is known of them."""
        found, behind, within = rows_before(np.array(places), self._begins, window)
        rows = mx.array(found)
        following = self.tokens[mx.minimum(rows + 1, self.tokens.size - 1)]
        return rows, Past(self.embed(following), mx.array(behind), mx.array(within))

    @cached_property
    def _begins(self) -> np.ndarray:
        """The first row of every text: each ends with a row that has none ahead."""
        last = np.flatnonzero(np.array(self.ahead) == 0)
        return np.concatenate([[0], last[:-1] + 1]).astype(np.int32)


def rows_before(
    places: np.ndarray, begins: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows that are needed to see a window before some rows of texts.

    Args:
        places: The rows.
        begins: The first row of every text, ascending.
        window: How many rows each sees, itself included.

    Returns:
        The rows, in order and so many more that their number is one of few, a multiple of the
        window; how many of the rows before each are its text's; and where the places are.
    """
    used, which = np.unique(np.searchsorted(begins, places, side="right"), return_inverse=True)
    used = used - 1
    first, last = np.full(used.size, np.iinfo(np.int32).max), np.zeros(used.size, np.int64)
    np.minimum.at(first, which, places)
    np.maximum.at(last, which, places)
    first = np.maximum(begins[used], first - window + 1)
    sizes = last - first + 1
    offsets = np.cumsum(sizes) - sizes
    behind = np.arange(sizes.sum()) - np.repeat(offsets, sizes)
    rows = behind + np.repeat(first, sizes)
    step = window * max(1, PAST_ROWS // window)
    padding = (0, -rows.size % step)
    within = places - first[which] + offsets[which]
    arrays = np.pad(rows, padding), np.pad(behind, padding), within
    return arrays[0].astype(np.int32), arrays[1].astype(np.int32), arrays[2].astype(np.int32)


def answer_places(mask: np.ndarray, before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return where the target chose a token, and how many such places follow each in its answer.

    Args:
        mask: Of a ``TextBatch``, (B, T).
        before: How many of the places before a text's first one are returned, too.

    Returns:
        Places in the flattened mask, in order, and counts. A text's last place is followed by none;
        those before its first one have -1.
    """
    learned = mask > 0
    ahead = np.full(mask.shape, -1, np.int32)
    for place in range(mask.shape[1] - 1, -1, -1):
        follows = ahead[:, place + 1] + 1 if place + 1 < mask.shape[1] else 0
        ahead[:, place] = np.where(learned[:, place], follows, -1)
    first, place = learned.argmax(axis=1)[:, None], np.arange(mask.shape[1])
    places = np.flatnonzero(learned | ((first - before <= place) & (place < first)))
    return places.astype(np.int32), ahead.reshape(-1)[places]


def unroll(drafter: Network, starts: Starts) -> Float[mx.array, "S L E"]:
    """Return what the drafter's head is given along every draft."""
    hidden, embeddings, *taps = map(
        mx.stop_gradient, (starts.hidden, starts.embeddings, *starts.taps)
    )
    past = None if starts.past is None else Past(*map(mx.stop_gradient, starts.past))
    return drafter.unrolled(hidden, taps, embeddings, past)


def drafter_loss(
    drafter: Network,
    starts: Starts,
    target_logits: Logits,
    decay: float = 0.8,
    kind: str = "kl",
) -> tuple[mx.array, mx.array]:
    """Return the weighted sum of a loss along drafts, and its count.

    Args:
        drafter: The student.
        starts: The drafts.
        target_logits: Makes the target's logits of goals, for what can be drafted.
        decay: The i-th drafted token weighs ``decay ** (i - 1)``.
        kind: Of loss, by its name in ``DRAFT_LOSSES``.
    """
    features = unroll(drafter, starts)
    length = starts.mask.shape[1]
    weights = starts.mask * decay ** mx.arange(length)

    def loss(
        logits: mx.array, goals: mx.array, weights: mx.array, *own: mx.array
    ) -> tuple[mx.array, mx.array]:
        values = DRAFT_LOSSES[kind](logits, target_logits(goals))
        if own:
            weights = weights * still_drafted(logits, Own(*own), length)
        return weighted_sum(values, weights), weights.sum()

    rows = [starts.goals, weights, *(starts.own or ())]
    rows = [row.reshape(-1, *row.shape[2:]) for row in rows]
    flat = features.reshape(-1, features.shape[-1])
    size = rows_at_once(drafter.head)
    if starts.own is not None:  # whole drafts
        size = max(length, size // length * length)
    return chunked_loss(drafter.head, flat, loss, rows, size)


def rows_at_once(head: nn.Linear) -> int:
    """Return how many rows of logits there are at a time."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return chunk_rows(head["weight"].shape[0], GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES)


def acceptance_by_depth(
    drafter: Network, starts: Starts, target_logits: Logits
) -> tuple[Float[mx.array, "2 L"], Float[mx.array, " L"]]:
    """Return summed acceptances of a drafted chain by depth, and their counts.

    Row 0 counts greedy agreement: how often the drafter's best token is the target's best, where
    the text itself is what was drafted before. Row 1 sums the probability with which sampling at
    temperature 1 would take the drafter's best token.
    """
    features = unroll(drafter, starts)
    size = max(1, rows_at_once(drafter.head) // features.shape[1])
    sums = mx.zeros((2, features.shape[1]))
    for first in range(0, features.shape[0], size):
        rows = slice(first, first + size)
        probs = mx.exp(log_probs(target_logits(starts.goals[rows])))
        best = mx.argmax(drafter.head(features[rows]), axis=-1)
        agreed = best == mx.argmax(probs, axis=-1)
        taken = mx.take_along_axis(probs, best[..., None], axis=-1)[..., 0]
        sums += mx.stack([(x * starts.mask[rows]).sum(axis=0) for x in (agreed, taken)])
        mx.eval(sums)  # one chunk at a time is in memory
    return sums, starts.mask.sum(axis=0)


def joined_views(views: list[TargetView]) -> TargetView:
    """Return several views of one target as one; the list is emptied.

    Only one kind of their rows is in memory twice at a time.
    """
    first = views[0]
    if len(views) == 1:
        return first
    embed, alike = first.embed, first.goals is first.hidden
    kinds = [list(one) for one in zip(*map(_rows, views), strict=True)]
    del first
    views.clear()
    joined = []
    for kind in kinds:
        joined.append(mx.concatenate(kind))
        mx.eval(joined[-1])
        kind.clear()
    hidden, tokens, ahead, *others = joined
    goals = hidden if alike else others.pop(0)
    return TargetView(hidden, tokens, ahead, goals, embed, tuple(others))


def _rows(view: TargetView) -> list[mx.array]:
    goals = [] if view.goals is view.hidden else [view.goals]
    return [view.hidden, view.tokens, view.ahead, *goals, *view.taps]
