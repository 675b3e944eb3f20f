"""The walks of several texts at once: one draw, one walk, and one report that the host reads.

Texts that are drawn by the same law, and have no logits processors, share the operations; what is
read is one array for all of them. The others walk by themselves, as ``cycle`` does it, and so do
drafts that were drawn from their drafter's own law.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import to_host
from mlx_distill.core.forest import Forest, Packing
from mlx_distill.core.sampling import Sampling, sample_fast
from mlx_distill.core.verification import Walk, follow_all
from mlx_distill.speculation.cycle import Cycle, walked
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.speculation.phases import phase

Walking = Sequence[tuple[Decoding, Cycle]]


@dataclass
class SharedReport:
    """What is read of several texts' cycles, at once.

    Args:
        array: Of every text the rows of ``Cycle.report``.
    """

    array: Int[mx.array, "R B N"]
    known: list[list[list[int]]] | None = None

    def host(self) -> list[list[list[int]]]:
        """Return the rows; only the first one that asks waits."""
        if self.known is None:
            self.known = to_host(self.array)
        return self.known


@dataclass(frozen=True)
class TextReport:
    """One text's part of a shared report.

    Args:
        shared: The report.
        place: Of the text in it.
        num_nodes: Of the text's tree.
        ranks: Whether the last row says how many nodes are likelier than each.
    """

    shared: SharedReport
    place: int
    num_nodes: int
    ranks: bool = field(default=True)

    def rows(self) -> list[list[int]]:
        """Return the rows that the report of a tree has; this waits once, for all of them."""
        rows = [row[self.place][: self.num_nodes] for row in self.shared.host()]
        return rows if self.ranks else rows[:-1]


def walk_all(
    walking: Walking,
    forest: Forest,
    logits: Float[mx.array, "*nodes V"],
    packing: Packing | None = None,
) -> None:
    """Walk the trees of all texts on the device; their reports are on their way then.

    Args:
        walking: The texts and their cycles.
        forest: Their trees.
        logits: The target's, at the nodes of all of them.
        packing: Where the nodes are in a list, (T, V); None if they are by texts, (B, N, V).
    """
    first = walking[0][0].sampling
    alike = all(
        not one.logits_processors and one.sampling == first and cycle.tree.laws is None
        for one, cycle in walking
    )
    if len(walking) > 1 and alike:
        _walk_together(walking, forest, logits, first, packing)
        return
    for decoding, cycle in walking:
        walked(decoding, cycle)


def _walk_together(
    walking: Walking,
    forest: Forest,
    logits: Float[mx.array, "*nodes V"],
    sampling: Sampling,
    packing: Packing | None,
) -> None:
    noise = _noise(walking, forest, packing) if sampling.temperature else None
    with phase("walk", noise) as made:
        drawn, certain = sample_fast(logits, sampling, noise)
        failed = mx.isnan(logits.max(axis=-1))
        if packing is not None:
            drawn, failed = packing.padded(drawn), packing.padded(failed)
            certain = None if certain is None else packing.padded(certain)
        walk = follow_all(forest, drawn)
        report = SharedReport(_report(forest, walk, drawn, failed, certain))
        mx.async_eval(report.array)
        made(report.array)
    for place, (_, cycle) in enumerate(walking):
        size = cycle.tree.tokens.size
        cycle.report = TextReport(report, place, size, cycle.tree.ranks is not None)
        cycle.in_doubt = certain is not None
        parts = walk.accepted[place, :size], walk.last[place], walk.next_token[place]
        cycle.walk = Walk(*parts, cycle.tree.max_depth)


def _noise(
    walking: Walking, forest: Forest, packing: Packing | None
) -> Float[mx.array, "*nodes V"]:
    """Return the noise at the nodes of all texts; padding has that of a root."""
    found = []
    for place, (decoding, cycle) in enumerate(walking):
        rows = decoding.rows(cycle.start, forest.max_depth + 1)
        assert rows is not None
        depths = forest.depths[place] if packing is None else cycle.tree.depths
        found.append(rows if forest.num_nodes == 1 else rows[depths])
    return mx.stack(found) if packing is None else mx.concatenate(found)


def _report(
    forest: Forest, walk: Walk, drawn: mx.array, failed: mx.array, certain: mx.array | None
) -> Int[mx.array, "R B N"]:
    """Return the rows of all texts in one array; ranks are the last one."""
    accepted = walk.accepted.reshape(drawn.shape)
    rows = [forest.parents, accepted, drawn, failed, *([] if certain is None else [certain])]
    rows.append(_ranks(forest))
    return mx.stack([row.astype(mx.int32) for row in rows])


def _ranks(forest: Forest) -> Int[mx.array, "B N"]:
    """Return how many nodes are likelier than each; anything where a tree does not say."""
    size = forest.num_nodes
    if size == 1 or all(tree.ranks is None for tree in forest.trees):
        return forest.parents
    rows = (tree.depths if tree.ranks is None else tree.ranks for tree in forest.trees)
    return mx.stack([mx.pad(row, (0, size - row.size)) for row in rows])
