"""Trees of several texts side by side, for one call of the target.

    text 1   A B C D
    text 2   X Y . .
    text 3   P . . .

Padding sees itself alone, and is never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Int

from mlx_distill.core.prefix_tree import PrefixTree

PADDING = -1  # in the place of a token: nothing that can be drawn


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
