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
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.arrays import to_host


@dataclass(frozen=True)
class PrefixTree:
    """Tokens as a tree, the way the target verifies them.

    Args:
        tokens: One per node; node 0 is the root.
        parents: Index of each node's parent; the root's own is 0.
        mask: Row i holds the ancestors of node i and i itself.
        depths: Distance of each node from the root.
        max_depth: No node is deeper than this, which the host knows without reading.
        ranks: How many nodes are likelier than each; None if the draft does not say.
        in_line: Whether every node is known to follow the one before it.
        laws: Logits whose softmax each drafted token of a chain was drawn from; None where the
            tokens were not drawn, or in sight of the target's noise.
    """

    tokens: Int[mx.array, " N"]
    parents: Int[mx.array, " N"]
    mask: Bool[mx.array, "N N"]
    depths: Int[mx.array, " N"]
    max_depth: int
    ranks: Int[mx.array, " N"] | None = None
    in_line: bool = False
    laws: Float[mx.array, "L V"] | None = None

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
        return cls(tokens, parents, mask, mask.sum(axis=1).astype(mx.int32) - 1, max_depth)

    @classmethod
    def root(cls, token: Int[mx.array, " 1"]) -> "PrefixTree":
        """Return the tree of one node: nothing is drafted, and the device has nothing to do."""
        zero, own = _root()
        return cls(token.astype(mx.int32), zero, own, zero, 0)

    @classmethod
    def chain(cls, tokens: Int[mx.array, " N"]) -> "PrefixTree":
        """Return the tree in which every token but the first follows the one before it."""
        return cls(tokens, *_line(tokens.size), tokens.size - 1, in_line=True)

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


@cache
def _root() -> tuple[mx.array, mx.array]:
    """Return the parents, which are the depths, too, and the mask of a root alone."""
    return mx.array([0], mx.int32), mx.array([[True]])


@lru_cache(maxsize=64)
def _line(size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the parents, the mask and the depths of a chain; the device has nothing to do."""
    depths = np.arange(size, dtype=np.int32)
    mask: list[list[bool]] = (depths[None] <= depths[:, None]).tolist()
    return mx.array(np.maximum(depths - 1, 0)), mx.array(mask), mx.array(depths)


def ancestors(parents: Int[mx.array, " N"], max_depth: int) -> Bool[mx.array, "N N"]:
    """Return which nodes are on the path to each node, itself included."""
    nodes = mx.arange(parents.size)
    links = (nodes[None] == parents[:, None]) | (nodes[None] == nodes[:, None])
    return connected(links.astype(mx.float32), max_depth) > 0


def connected(links: Float[mx.array, "N N"], max_depth: int) -> Float[mx.array, "N N"]:
    """Return what is above 0 where a node is on the path to another, or is that one.

    Squaring doubles the reach of the links, so a depth of d takes ceil(log2 d) products of N x N.
    The entries count the ways, in float32: fewer than 2^64 up to a depth of 64.

    Args:
        links: 1 between every node and itself, and from every node to its parent, else 0.
        max_depth: No node is deeper than this.
    """
    steps = 1
    while steps < max_depth:
        links = links @ links
        steps *= 2
    return links


def parents_of(lines: Float[mx.array, "N N"]) -> tuple[Bool[mx.array, "N N"], Int[mx.array, " N"]]:
    """Return the mask and the parents of a tree, of what ``connected`` returns.

    The closest ancestor is the one with the greatest index.
    """
    index = mx.array(np.arange(lines.shape[0], dtype=np.int32))
    mask = lines > 0
    above = mx.where(mask & (index[None] < index[:, None]), index[None], 0)
    return mask, above.max(axis=-1)
