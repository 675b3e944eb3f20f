"""What a drafter proposes: tokens that may follow, each with its parent and its score.

    tokens   A  B  C  D        A - B - D
    parents  0  0  0  1          `- C
    depths   0  1  1  2

Beams, best-first trees, chains and n-grams are all drafts; ``PrefixTree`` is the part of one that
the target verifies.
"""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from mlx_distill.arrays import to_host
from mlx_distill.core.prefix_tree import PrefixTree, ancestors

# Worse than every score; what is not a number counts as this, so that it is never preferred.
WORST_SCORE = -1e30


@dataclass(frozen=True)
class Draft:
    """Continuations of a token that is certain, as a tree in which parents come first.

    Args:
        tokens: One per node; node 0 is the certain one, the root. Siblings carry different tokens.
        parents: Index of each node's parent, smaller than its own; the root's is 0.
        depths: Distance of each node from the root.
        scores: Log-probability, or any other measure, of the path to each node; 0 for the root,
            and never above the parent's.
        max_depth: The depth of the deepest node, which the host knows without reading.
    """

    tokens: Int[mx.array, " N"]
    parents: Int[mx.array, " N"]
    depths: Int[mx.array, " N"]
    scores: Float[mx.array, " N"]
    max_depth: int

    @classmethod
    def chain(cls, root: Int[mx.array, " 1"], tokens: list[int]) -> "Draft":
        """Return the draft of one continuation, whose tokens the host knows."""
        nodes = mx.concatenate([root.astype(mx.int32), mx.array(tokens, mx.int32)])
        depths = mx.arange(nodes.size)
        scores = -depths.astype(mx.float32)
        return cls(nodes, mx.maximum(depths - 1, 0), depths, scores, len(tokens))

    def best_first(self, num_nodes: int) -> PrefixTree:
        """Return the tree of the root and the ``num_nodes`` - 1 nodes with the highest scores.

        No node is better than its parent, so the chosen ones form a tree. Those on the best path of
        full length come first, as nodes 1, 2, ...: where they are accepted, their keys and values
        already lie where the text needs them. The shape is fixed and nothing is read by the host.
        """
        if num_nodes == 1:
            return PrefixTree.root(self.tokens[:1])
        arrays = (self.tokens, self.parents, self.depths, self.scores)
        depth = min(self.max_depth, num_nodes - 1)
        return PrefixTree(*_best_first(*arrays, self.max_depth, num_nodes), depth)

    def best_chain(self, num_nodes: int) -> PrefixTree:
        """Return the best path of full length, cut to ``num_nodes`` nodes, as a tree."""
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


@mx.compile  # some thirty small operations, which cost more to start than to do
def _best_first(
    tokens: mx.array,
    parents: mx.array,
    depths: mx.array,
    scores: mx.array,
    max_depth: int,
    num_nodes: int,
) -> tuple[mx.array, mx.array, Bool[mx.array, "N N"], mx.array]:
    size = tokens.size
    scores = mx.where(scores > WORST_SCORE, scores, WORST_SCORE)
    # A sure token leaves a path as probable as its parent's: depth has to break that tie. The
    # margin is relative, so that float32 can hold it at any score.
    rank = scores - 1e-5 * depths * mx.maximum(1, -scores)
    order = mx.argsort(-rank)[:num_nodes]
    # By index, which puts parents before children, but the best path before all.
    best = mx.stack(_best_path(parents, depths, scores, max_depth))
    on_best = (order[:, None] == best[None]).any(axis=1)
    order = mx.sort(order + mx.where(on_best, 0, size)) % size
    links = mx.argmax(order[None] == parents[order][:, None], axis=1).astype(mx.int32)
    mask = ancestors(links, min(max_depth, num_nodes - 1))
    return tokens[order], links, mask, depths[order]


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
