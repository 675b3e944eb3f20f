"""Where the nodes of one tree call lie: what every layer's view of its cache shares.

All of it is made on the device, once per call, by the first layer that asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class TreeLayout:
    """What every layer of one tree call shares.

    Args:
        mask: Row i holds the ancestors of node i and i itself.
        depths: Distance of each node from the root, which has depth 0.
        start: Position of the root: how many tokens are cached.
        batched: Whether the nodes are batch rows (see ``tree_cache``).
        max_depth: No node is deeper than this.
        in_line: Whether every node is known to follow the one before it.
        as_text: Whether the model is given the caches themselves, as for a run of text.
        exact_paths: The nodes from the root to each node, where each node's result is to be that
            of a step of plain decoding, to the last bit; else None.
    """

    mask: Bool[mx.array, "N N"]
    depths: Int[mx.array, " N"]
    start: int
    batched: bool
    max_depth: int
    in_line: bool = False
    as_text: bool = False
    exact_paths: list[list[int]] | None = None
    masks: dict[object, mx.array] = field(default_factory=dict, compare=False, repr=False)

    num_texts = 1

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.depths.size

    @cached_property
    def positions(self) -> Int[mx.array, " N"]:
        """Position of every node in the text."""
        return self.depths + self.start

    @cached_property
    def reach(self) -> Float[mx.array, "N N"]:
        """The mask in numbers: times a column, it sums that up along each node's ancestors."""
        return self.mask.astype(mx.float32)

    @cached_property
    def above(self) -> Bool[mx.array, "N N"]:
        """The ancestors of each node without itself."""
        return self.mask & (self.depths[None] < self.depths[:, None])

    @cached_property
    def paths(self) -> Int[mx.array, "N S"]:
        """The nodes from the root to each node; behind it, any."""
        here = self.depths[None] == mx.arange(self.max_depth + 1)[:, None]
        return mx.argmax(self.mask[:, None] & here[None], axis=-1).astype(mx.int32)

    def starts_of(self, nodes: Sequence[int] | None = None) -> int:
        """Return where the text begins that nodes belong to."""
        return self.start

    def windows(self, size: int) -> Int[mx.array, "N W"]:
        """Return the latest ``size`` tokens up to each node.

        They are numbered as what a convolution is given: the ``size`` - 1 tokens before the root
        come first, then the nodes.
        """
        key = ("windows", size)
        if key not in self.masks:
            kept = mx.broadcast_to(mx.arange(size - 1), (self.num_nodes, size - 1))
            lines = mx.concatenate([kept, self.paths + size - 1], axis=1)
            columns = self.depths[:, None] + mx.arange(size)
            self.masks[key] = mx.take_along_axis(lines, columns, axis=1)
        return self.masks[key]
