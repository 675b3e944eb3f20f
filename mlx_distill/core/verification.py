"""Sample and follow: exact verification of any tree.

Draw y from the target's distribution at the root. If a child carries y, step to it and draw again
there; otherwise emit y and stop. Every token is thus drawn from the target's own distribution,
whatever the tree holds and however it was made; a bad draft costs speed, never quality. At
temperature 0 the draw is the most probable token.

    root A, drawn B     A -> B accepted, drawn D     B -> D accepted, drawn X: no child X
        A                   A                            A
        |- B                |- B                         |- B        emitted: B D X
        |  `- D             |  `- D                      |  `- D
        `- C                `- C                         `- C

The draws at all nodes are made at once; the walk is a few gathers on the device. A draw takes its
random numbers from its place in the text (``TextNoise``), not from the tree or the cycle. So the
text would be the same, token for token, had nothing been drafted, and a drafter may look at the
numbers: it then guesses the draws themselves.
"""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from mlx_distill.core.forest import Forest
from mlx_distill.core.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Walk:
    """Where the draws led.

    Args:
        accepted: Which nodes are on the walked path; the root always is.
        last: Index of the path's last node.
        next_token: What was drawn there: emitted, and the root of the next tree.
        max_depth: No path is longer than this.
    """

    accepted: Bool[mx.array, "... N"]
    last: Int[mx.array, "..."]
    next_token: Int[mx.array, "..."]
    max_depth: int

    @cached_property
    def path(self) -> Int[mx.array, "... T"]:
        """The path's nodes, root first; the last one is repeated up to the greatest length."""
        nodes = mx.where(self.accepted, mx.arange(self.accepted.shape[-1]), self.last[..., None])
        # Every other node counts as the last one, which therefore comes after the path.
        return mx.sort(nodes, axis=-1)[..., : self.max_depth + 1]


def follow(tree: PrefixTree, drawn: Int[mx.array, "... N"]) -> Walk:
    """Return the path from the root along the tokens that were drawn.

    Args:
        tree: Siblings carry different tokens.
        drawn: A token from the target's distribution at every node; leading axes are independent
            draws.
    """
    if tree.max_depth == 0 and drawn.ndim == 1:
        return Walk(tree.mask[0], tree.parents[0], drawn.reshape(()), 0)
    return Walk(*_followed(tree.tokens, tree.parents, tree.mask, drawn), tree.max_depth)


def follow_all(forest: Forest, drawn: Int[mx.array, "B N"]) -> Walk:
    """Return the paths through several texts' trees; the fields have an axis for them in front.

    Args:
        forest: The trees.
        drawn: A token from the target's distribution at every node; behind a tree's end, any.
    """
    if forest.num_nodes == 1:
        return Walk(forest.mask[:, 0], forest.parents[:, 0], drawn[:, 0], 0)
    arrays = forest.tokens, forest.parents, forest.mask
    return Walk(*_all_followed(*arrays, drawn), forest.max_depth)


@mx.compile
def _all_followed(
    tokens: Int[mx.array, "B N"],
    parents: Int[mx.array, "B N"],
    mask: Bool[mx.array, "B N N"],
    drawn: Int[mx.array, "B N"],
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the fields of the walks; see ``_followed``. Padding is never entered."""
    node = mx.array(np.arange(tokens.shape[1], dtype=np.int32))
    entered = (mx.take_along_axis(drawn, parents, axis=1) == tokens) | (node == 0)
    accepted = ~(mask & ~entered[:, None]).any(axis=-1)
    last = mx.where(accepted, node, 0).max(axis=-1)
    next_token = mx.take_along_axis(drawn, last[:, None], axis=1).squeeze(1)
    return accepted, last, next_token


@mx.compile
def _followed(
    tokens: Int[mx.array, " N"],
    parents: Int[mx.array, " N"],
    mask: Bool[mx.array, "N N"],
    drawn: Int[mx.array, "... N"],
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the fields of a walk; this is six operations."""
    node = mx.array(np.arange(tokens.size, dtype=np.int32))
    # A node is entered if its parent drew its token; it is reached if all on its path are entered.
    drawn_before = mx.take(drawn, parents, axis=-1)[..., None, :]
    entered = (drawn_before == tokens) | (node == 0)
    accepted = ~(mask & ~entered).any(axis=-1)
    last = mx.where(accepted, node, 0).max(axis=-1)  # parents come before their children
    next_token = mx.take_along_axis(drawn, last[..., None], axis=-1).squeeze(-1)
    return accepted, last, next_token
