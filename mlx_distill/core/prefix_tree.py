"""Beams that share prefixes, packed so that every distinct prefix is verified once.

    beams  91 92 93 95        tree  91 - 92 - 93 - 95
           91 92 94 96                |     `- 97
           91 92 93 97                `- 94 - 96

    packed  91 92 93 95 94 96 97
    depths   0  1  2  3  2  3  3

Node 0 is the root: the token that is certain. A node's parent always has a smaller index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.arrays import to_host


@dataclass(frozen=True)
class PrefixTree:
    """Draft tokens as a tree.

    Args:
        tokens: One per node; node 0 is the root.
        parents: Index of each node's parent; the root's own is 0.
        mask: Row i holds the ancestors of node i and i itself.
        depths: Distance of each node from the root.
    """

    tokens: Int[mx.array, " N"]
    parents: Int[mx.array, " N"]
    mask: Bool[mx.array, "N N"]
    depths: Int[mx.array, " N"]

    @classmethod
    def from_parents(
        cls, tokens: Int[mx.array, " N"], parents: Int[mx.array, " N"], max_depth: int
    ) -> "PrefixTree":
        """Return the tree of nodes whose parents are known; no host read.

        Args:
            tokens: One per node.
            parents: Index of each node's parent; 0 for the root.
            max_depth: No node is deeper than this.
        """
        mask = ancestors(parents, max_depth)
        return cls(tokens, parents, mask, mask.sum(axis=1).astype(mx.int32) - 1)

    @classmethod
    def root(cls, token: Int[mx.array, " 1"]) -> "PrefixTree":
        """Return the tree of one node: nothing is drafted."""
        zero = mx.zeros((1,), mx.int32)
        return cls(token, zero, mx.ones((1, 1), mx.bool_), zero)

    @classmethod
    def from_beams(cls, beams: Sequence[Sequence[int]] | Int[np.ndarray, "W T"]) -> "PrefixTree":
        """Return the tree of the distinct prefixes of beams that begin with the same token.

        The nodes come in the order in which the beams, one after the other, first use them.

        Raises:
            ValueError: If there are no beams, or they begin with different tokens.
        """
        rows = [[int(token) for token in beam] for beam in beams]
        if not rows or not all(rows):
            raise ValueError("beams must hold at least one token")
        if len({row[0] for row in rows}) > 1:
            raise ValueError("beams must begin with the same token")
        tokens, parents, depths = [rows[0][0]], [0], [0]
        children: dict[tuple[int, int], int] = {}
        for row in rows:
            node = 0
            for depth, token in enumerate(row[1:], start=1):
                child = children.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depth)
                node = child
        return cls.from_parents(mx.array(tokens), mx.array(parents), max(depths))

    def paths(self) -> list[list[int]]:
        """Return the node indices from the root to each node; reads the arrays."""
        parents: list[int] = to_host(self.parents)
        paths = [[0]]
        for node, parent in enumerate(parents[1:], start=1):
            paths.append([*paths[parent], node])
        return paths


def ancestors(parents: Int[mx.array, " N"], max_depth: int) -> Bool[mx.array, "N N"]:
    """Return which nodes are on the path to each node, itself included.

    Squaring (identity + parent links) doubles the reach of the links, so a depth of d takes
    ceil(log2 d) products of N x N.
    """
    nodes = mx.arange(parents.size)
    reach = (nodes[None] == parents[:, None]) | (nodes[None] == nodes[:, None])
    steps = 1
    while steps < max_depth:
        product = reach.astype(mx.float32)
        reach = (product @ product) > 0
        steps *= 2
    return reach


@dataclass(frozen=True)
class BeamLevels:
    """What a beam search met, level by level; level l holds the tokens at depth l + 1.

    Args:
        tokens: The beams' tokens at every level.
        parents: Index, in the level before, of the beam that each continues; 0 at the first.
        scores: Log-probability of the path down to each token.
    """

    tokens: Int[mx.array, "L W"]
    parents: Int[mx.array, "L W"]
    scores: Float[mx.array, "L W"]

    def best_first(self, root: Int[mx.array, " 1"], num_nodes: int) -> PrefixTree:
        """Return the tree of the root and the ``num_nodes`` - 1 most probable paths.

        A path is never more probable than its parent's, so the chosen nodes form a tree. Those on
        the likeliest beam come first, as nodes 1, 2, ...: where they are accepted, their keys and
        values already lie where the text needs them. The shape is fixed and nothing is read by the
        host.
        """
        if num_nodes == 1:
            return PrefixTree.root(root.astype(mx.int32))
        arrays = (self.tokens, self.parents, self.scores, root)
        return PrefixTree(*_best_first(*arrays, num_nodes))

    def beams(self, root: Int[mx.array, " 1"]) -> Int[mx.array, "W T"]:
        """Return the beams of the last level, each from the root on, most probable first."""
        beam = mx.argsort(-self.scores[-1])
        columns = []
        for tokens, parents in zip(self.tokens[::-1], self.parents[::-1], strict=True):
            columns.append(tokens[beam])
            beam = parents[beam]
        columns.append(mx.broadcast_to(root.astype(mx.int32), beam.shape))
        return mx.stack(columns[::-1], axis=1)


@mx.compile  # some thirty small operations, which cost more to start than to do
def _best_first(
    tokens: mx.array, parents: mx.array, scores: mx.array, root: mx.array, num_nodes: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    length, width = tokens.shape
    # A sure token leaves a path as probable as its parent's: depth has to break that tie. The
    # margin is relative, so that float32 can hold it at any score.
    depth = mx.arange(1, length + 1)[:, None]
    rank = scores - 1e-5 * depth * mx.maximum(1, -scores)
    order = mx.argsort(-rank.reshape(-1))[: num_nodes - 1]
    # Level by level, which puts parents before children, but the likeliest path before all.
    aside = mx.where(_likeliest(parents, scores).reshape(-1)[order], 0, length * width)
    order = mx.sort(order + aside) % (length * width)
    level = order // width
    parent = (level - 1) * width + parents.reshape(-1)[order]
    place = mx.argmax(order[None] == parent[:, None], axis=1) + 1
    zero = mx.zeros((1,), mx.int32)
    nodes = mx.concatenate([root.astype(mx.int32), tokens.reshape(-1)[order]])
    links = mx.concatenate([zero, mx.where(level == 0, 0, place).astype(mx.int32)])
    depths = mx.concatenate([zero, level.astype(mx.int32) + 1])
    return nodes, links, ancestors(links, length), depths


def _likeliest(parents: mx.array, scores: mx.array) -> mx.array:
    """Return which tokens, (L, W), are on the most probable path of full length."""
    beam = mx.argmax(scores[-1])
    path = [beam]
    for level in parents[:0:-1]:
        beam = level[beam]
        path.append(beam)
    return mx.stack(path[::-1])[:, None] == mx.arange(scores.shape[1])
