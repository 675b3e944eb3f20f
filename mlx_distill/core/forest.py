"""Trees of several texts side by side, for one call of the target.

    text 1   A B C D
    text 2   X Y . .
    text 3   P . . .

Padding sees itself alone, and is never drawn. Where the trees differ much in size, what works row
by row is spared it: their nodes are one list then, A B C D X Y P.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int, Shaped

from mlx_distill.core.prefix_tree import PrefixTree

PADDING = -1  # in the place of a token: nothing that can be drawn
# Nodes are a list where that has so small a share of the rows of padded trees. To take them apart
# and together again for attention costs every layer four small copies.
PACKED = 0.75


@dataclass(frozen=True)
class Packing:
    """Where the nodes of several trees are in a list of all of them.

    Args:
        sizes: Of the trees.
    """

    sizes: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes of all trees."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each tree begins in the list."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    @cached_property
    def _padded(self) -> Int[mx.array, "B N"]:
        """The place in the list of every node; of padding, that of its tree's last one."""
        column, last = np.arange(max(self.sizes)), np.array(self.sizes)[:, None] - 1
        return mx.array(np.array(self.starts)[:, None] + np.minimum(column, last))

    @cached_property
    def _packed(self) -> Int[mx.array, " T"]:
        """The place of every node of the list among padded ones, numbered through all trees."""
        width = max(self.sizes)
        places = [range(row * width, row * width + size) for row, size in enumerate(self.sizes)]
        return mx.array([place for one in places for place in one])

    def packed(self, x: Shaped[mx.array, "B N ..."]) -> Shaped[mx.array, "T ..."]:
        """Return the nodes' entries as a list."""
        return x.flatten(0, 1)[self._packed]

    def padded(self, x: Shaped[mx.array, "T ..."]) -> Shaped[mx.array, "B N ..."]:
        """Return a list's entries by trees."""
        return x[self._padded]

    def rows(self, x: Shaped[mx.array, "1 H T D"]) -> Shaped[mx.array, "B H N D"]:
        """Return what heads have for the nodes of a list, by trees."""
        return mx.take(x[0], self._padded, axis=1).swapaxes(0, 1)

    def line(self, x: Shaped[mx.array, "B H N D"]) -> Shaped[mx.array, "1 H T D"]:
        """Return what heads have for the nodes of trees, as a list."""
        return mx.take(x.swapaxes(0, 1).flatten(1, 2), self._packed, axis=1)[None]


@dataclass(frozen=True)
class Forest:
    """Trees, padded to the size of the largest.

    Args:
        trees: One per text.
        tokens: One per node; ``PADDING`` behind a tree's last one.
        parents: Index of each node's parent; 0 for roots and padding.
        mask: Row i of a tree holds the ancestors of node i and i itself.
        depths: Distance of each node from its root.
    """

    trees: tuple[PrefixTree, ...]
    tokens: Int[mx.array, "B N"]
    parents: Int[mx.array, "B N"]
    mask: Bool[mx.array, "B N N"]
    depths: Int[mx.array, "B N"]

    @classmethod
    def of(cls, trees: Sequence[PrefixTree]) -> "Forest":
        """Return trees side by side."""
        size = max(tree.tokens.size for tree in trees)
        padded = [_padded(tree, size) for tree in trees]
        arrays = (mx.stack(list(column)) for column in zip(*padded, strict=True))
        return cls(tuple(trees), *arrays)

    @property
    def num_nodes(self) -> int:
        """Nodes of the largest tree."""
        return self.tokens.shape[1]

    @cached_property
    def packing(self) -> Packing | None:
        """Where the nodes are in a list of all of them; None where padding costs little."""
        packing = Packing(tuple(tree.tokens.size for tree in self.trees))
        padded = len(self.trees) * self.num_nodes
        return packing if packing.num_nodes <= PACKED * padded else None

    @cached_property
    def max_depth(self) -> int:
        """No node of any tree is deeper than this."""
        return max(tree.max_depth for tree in self.trees)


def _padded(tree: PrefixTree, size: int) -> tuple[mx.array, ...]:
    """Return a tree's tokens, parents, mask and depths with padding behind them."""
    more = size - tree.tokens.size
    rows = (tree.tokens, tree.parents, tree.mask, tree.depths)
    if not more:
        return rows
    tokens = mx.pad(tree.tokens, (0, more), constant_values=PADDING)
    parents, depths = (mx.pad(x, (0, more)) for x in (tree.parents, tree.depths))
    mask = mx.pad(tree.mask, (0, more)) | mx.eye(size, dtype=mx.bool_)
    return tokens, parents, mask, depths
