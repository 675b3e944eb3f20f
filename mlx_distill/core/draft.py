"""What a drafter proposes: tokens that may follow, each with its parent and its score.

    tokens   A  B  C  D        A - B - D
    parents  0  0  0  1          `- C
    depths   0  1  1  2

Beams, best-first trees, chains and n-grams are all drafts; ``PrefixTree`` is the part of one that
the target verifies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.arrays import to_host
from mlx_distill.core.prefix_tree import PrefixTree, connected, parents_of

# Worse than every score; what is not a number counts as this, so that it is never preferred.
WORST_SCORE = -1e30
# Of more nodes than these, the likeliest are found before any is compared with every other.
MOST_COMPARED = 1024
# Added to a node's index, so that what comes later in a tree, or is not wanted, has higher numbers.
OTHERS, UNWANTED = 2**16, 2**17


@dataclass(frozen=True)
class Draft:
    """Continuations of a token that is certain, as a tree in which parents come first.

    Drafts of several roots have an axis for them in front; the methods are of one root's.

    Args:
        tokens: One per node; node 0 is the certain one, the root. Siblings carry different tokens.
        parents: Index of each node's parent, smaller than its own; the root's is 0.
        depths: Distance of each node from the root.
        scores: Log-probability, or any other measure, of the path to each node; 0 for the root,
            and never above the parent's.
        max_depth: The depth of the deepest node, which the host knows without reading.
        spare: So many nodes, less likely than the others, say nothing of their own, and are never
            verified.
        laws: As ``PrefixTree`` has them.
    """

    tokens: Int[mx.array, "... N"]
    parents: Int[mx.array, "... N"]
    depths: Int[mx.array, "... N"]
    scores: Float[mx.array, "... N"]
    max_depth: int
    spare: int = 0
    laws: Float[mx.array, "L V"] | None = None

    @classmethod
    def chain(cls, root: Int[mx.array, " 1"], tokens: list[int]) -> "Draft":
        """Return the draft of one continuation, whose tokens the host knows."""
        nodes = mx.concatenate([root.astype(mx.int32), mx.array(tokens, mx.int32)])
        depths = mx.arange(nodes.size)
        scores = -depths.astype(mx.float32)
        return cls(nodes, mx.maximum(depths - 1, 0), depths, scores, len(tokens))

    def best_first(self, num_nodes: int) -> PrefixTree:
        """Return the tree of the root and the ``num_nodes`` - 1 nodes with the highest scores.

        No node is better than its parent, so the chosen ones form a tree. The root's likeliest
        child is node 1, that node's likeliest child node 2, and so on: where they are accepted,
        their keys and values already lie where the text needs them. The shape is fixed and nothing
        is read by the host.
        """
        if num_nodes == 1:
            return PrefixTree.root(self.tokens[:1])
        num_nodes = min(num_nodes, self.tokens.size - self.spare)
        if self.tokens.size == self.max_depth + 1:  # nodes in a line are in order
            chain = PrefixTree.chain(self.tokens[:num_nodes])
            laws = None if self.laws is None else self.laws[: num_nodes - 1]
            return replace(chain, ranks=chain.depths, laws=laws)
        arrays = (self.tokens, self.parents, self.depths, self.scores)
        if self.tokens.size > MOST_COMPARED:
            arrays = _likeliest(*arrays, num_nodes)
        depth = min(self.max_depth, num_nodes - 1)
        limit = mx.array([num_nodes])
        tokens, parents, mask, depths, ranks = _best_first(*arrays, limit, num_nodes, depth)
        return PrefixTree(tokens, parents, mask, depths, depth, ranks)

    def best_chain(self, num_nodes: int) -> PrefixTree:
        """Return the best path of full length, cut to ``num_nodes`` nodes, as a tree."""
        if self.laws is not None:  # there is one path
            return self.best_first(num_nodes)
        path = mx.stack(_best_path(self.parents, self.depths, self.scores, self.max_depth))
        return PrefixTree.chain(self.tokens[path[:num_nodes]])

    def beams(self) -> list[list[int]]:
        """Return the paths of full length, root first and the best path first, as tokens.

        This reads the arrays.
        """
        rows = mx.stack([self.tokens, self.parents, self.depths])
        tokens, parents, depths = to_host(rows)
        scores = to_host(self.scores)
        ends = [node for node, depth in enumerate(depths) if depth == self.max_depth]
        beams = []
        for node in sorted(ends, key=lambda end: -scores[end]):
            beam = [tokens[node]]
            while node:
                node = parents[node]
                beam.append(tokens[node])
            beams.append(beam[::-1])
        return beams


@dataclass(frozen=True)
class KnownDraft(Draft):
    """A draft of one root that the host knows; the device has nothing to do to make trees of it.

    Args:
        rows: Per node its token, its parent and its depth.
        likely: Its score.
    """

    rows: tuple[tuple[int, int, int], ...] = ()
    likely: tuple[float, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]], scores: Sequence[float]) -> "KnownDraft":
        """Return the draft of nodes that the host knows, each behind its parent."""
        tokens, parents, depths = (mx.array(list(x), mx.int32) for x in zip(*rows, strict=True))
        scores, rows = tuple(scores), tuple(rows)
        deepest = max(row[2] for row in rows)
        return cls(tokens, parents, depths, mx.array(scores), deepest, rows=rows, likely=scores)

    def best_first(self, num_nodes: int) -> PrefixTree:
        """Return the same tree, in the same order, made here."""
        likely = self.likely
        best = sorted(range(len(likely)), key=lambda node: -likely[node])[:num_nodes]
        order, parents, mask = arranged([row[1] for row in self.rows], best)
        depths = [self.rows[node][2] for node in order]
        ranks = [best.index(node) for node in order]
        columns = [[self.rows[node][0] for node in order], parents, depths, ranks]
        fields = mx.array(columns, mx.int32)
        return PrefixTree(
            fields[0],
            fields[1],
            mx.array(mask),
            fields[2],
            max(depths),
            fields[3],
            in_line=parents == [max(0, node - 1) for node in range(len(parents))],
        )


def arranged(
    parents: Sequence[int], best: Sequence[int]
) -> tuple[list[int], list[int], list[list[bool]]]:
    """Return some nodes in the order of ``Draft.best_first``, their parents and their ancestors.

    Args:
        parents: Of all nodes, each of a smaller number than its children.
        best: The nodes of the tree, the likeliest first.

    Returns:
        The nodes, for each of them its parent's place among these, and which of these are on the
        path to it.
    """
    line = [0]
    for node in best[1:]:  # the likeliest child comes first
        if parents[node] == line[-1]:
            line.append(node)
    order = [*line, *(node for node in sorted(best) if node not in line)]
    place = {node: index for index, node in enumerate(order)}
    above = [place[parents[node]] for node in order]
    mask = np.eye(len(order), dtype=np.bool_)
    for index, parent in enumerate(above):
        mask[index] |= mask[parent]
    return order, above, mask.tolist()


def best_first_of_all(draft: Draft, num_nodes: Sequence[int]) -> list[PrefixTree]:
    """Return what ``Draft.best_first`` returns of the drafts of several roots, with so many nodes.

    One by one: mapped over the roots by MLX 0.32, these operations write beyond their arrays.
    """
    fields = draft.tokens, draft.parents, draft.depths, draft.scores
    each = zip(*fields, strict=True)
    drafts = [Draft(*one, draft.max_depth, draft.spare) for one in each]
    return [one.best_first(nodes) for one, nodes in zip(drafts, num_nodes, strict=True)]


@mx.compile  # in few operations: on a GPU each costs more to start than to do
def _best_first(
    tokens: Int[mx.array, " M"],
    parents: Int[mx.array, " M"],
    depths: Int[mx.array, " M"],
    scores: Float[mx.array, " M"],
    limit: Int[mx.array, " 1"],
    num_nodes: int,
    max_depth: int,
) -> tuple[mx.array, ...]:
    """Return tokens, parents, mask, depths and ranks of a tree of ``limit`` = ``num_nodes`` nodes.

    Every node is compared with every other. What stands below each other in a table of several
    is made by one operation; that no number of the shape is written into one keeps them for all.
    """
    index = mx.array(np.arange(tokens.size, dtype=np.int32))
    row = mx.array(np.arange(4, dtype=np.int32)[:, None])
    this, other = index[:, None], index[None]
    likely = likelihood(scores, depths)
    mine, others = likely[:, None], likely[None]
    likelier = mx.where(other < this, others >= mine, others > mine)
    sibling = (parents[:, None] == parents[None]) & (other > 0)
    link = (parents[:, None] == other) | (this == other)
    kind = row[:3, :, None]
    table = mx.where(kind == 2, link, likelier & (sibling | (kind == 0))).astype(mx.float32)
    better, lines = table[:2].sum(axis=-1), connected(table[2:].squeeze(0), max_depth)
    # On the line of likeliest children no node, nor any above it, has a likelier sibling.
    beside = (lines @ better[1:].T).T
    place = other + OTHERS * (beside > 0) + UNWANTED * (better[:1] >= limit)
    ranks = better[:1].astype(mx.int32)
    columns = mx.where(row == 2, depths[None], mx.where(row == 1, tokens[None], ranks))
    table = mx.where(row == 0, place, columns)
    order = mx.argsort(table[:1].squeeze(0))[:num_nodes]
    mask, parents = parents_of(lines[order[:, None], order[None]])
    tokens, depths, ranks = mx.split(mx.take(table[1:], order, axis=1).reshape(-1), 3)
    return tokens, parents, mask, depths, ranks


def likelihood(scores: mx.array, depths: mx.array) -> mx.array:
    """Return scores that put every node behind its parent.

    A sure token leaves a path as probable as its parent's: depth has to break that tie. The margin
    is absolute near 0 and relative beyond -1, so that float32 can hold it at any score.
    """
    scores = mx.where(scores > WORST_SCORE, scores, WORST_SCORE)
    margin = 1e-5 * depths
    return mx.minimum(scores - margin, scores * (1 + margin))


def _likeliest(
    tokens: mx.array, parents: mx.array, depths: mx.array, scores: mx.array, num_nodes: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return the likeliest nodes, which form a tree, in their order."""
    order = mx.sort(mx.argsort(-likelihood(scores, depths))[:num_nodes])
    links = mx.argmax(order[None] == parents[order][:, None], axis=1).astype(mx.int32)
    return tokens[order], links, depths[order], scores[order]


def _best_path(
    parents: mx.array, depths: mx.array, scores: mx.array, max_depth: int
) -> list[mx.array]:
    """Return the nodes of the best path of full length, root first."""
    node = mx.argmax(mx.where(depths == max_depth, scores, -mx.inf))
    path = [node]
    for _ in range(max_depth):
        node = parents[node]
        path.append(node)
    return path[::-1]
