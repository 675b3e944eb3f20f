"""One layer's rows of several texts, seen by the nodes of their trees during one call.

Where every text reads tokens in a line (a step, a prompt), they are written where they stay. The
nodes of trees are written behind the longest row first, side by side, which is one copy for all
texts; what is accepted of them is then written once more, where each text needs it:

    length 3   a b c . . | N N N        accepted N0, N2        a b c N0 N2
    length 5   p q r s t | M M M                 M0            p q r s t M0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Int, Integer

from mlx_distill.target.batch.rows import KeyRows, slots_of


@dataclass(frozen=True)
class RowsLayout:
    """What every layer of one call shares.

    Args:
        mask: The trees' masks; None where the tokens of every text are in a line.
        depths: Of the nodes.
        lengths: How many tokens each text has before them.
    """

    mask: Bool[mx.array, "B N N"] | None
    depths: Int[mx.array, "B N"]
    lengths: tuple[int, ...]
    masks: dict[object, mx.array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_nodes(self) -> int:
        """Nodes of a text, padding included."""
        return self.depths.shape[1]

    @property
    def longest(self) -> int:
        """The longest text before the call."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> Int[mx.array, " B"]:
        """Where each text's first node is."""
        return mx.array(self.lengths, mx.int32)

    @cached_property
    def positions(self) -> Int[mx.array, "B N"]:
        """Position of every node in its text."""
        return self.depths + self.starts[:, None]

    @property
    def offset(self) -> Int[mx.array, "..."]:
        """The positions as the models' ropes take them: of single tokens, one per text."""
        return self.starts if self.num_nodes == 1 else self.positions

    def moved(self, num_heads: int, num_slots: int) -> Integer[mx.array, " R"]:
        """Return where nodes in a line lie in the rows of a layer."""
        key = ("moved", num_heads, num_slots)
        if key not in self.masks:
            places = [
                (text, start + node)
                for text, start in enumerate(self.lengths)
                for node in range(self.num_nodes)
            ]
            self.masks[key] = slots_of(places, num_heads, num_slots)
        return self.masks[key]


@dataclass(frozen=True)
class Paths:
    """What becomes text of a call, and where it lies then.

    Args:
        lengths: Of the texts before the call.
        paths: The accepted nodes of each text, root first.
    """

    lengths: tuple[int, ...]
    paths: Sequence[Sequence[int]]
    slots: dict[tuple[int, int], mx.array] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> tuple[Int[mx.array, " T"], Int[mx.array, " T"]]:
        """The text and the number of every accepted node."""
        nodes = [(text, node) for text, path in enumerate(self.paths) for node in path]
        texts, numbers = (mx.array(list(x)) for x in zip(*nodes, strict=True))
        return texts, numbers

    def moved(self, num_heads: int, num_slots: int) -> Integer[mx.array, " R"]:
        """Return where they belong in the rows of a layer."""
        key = num_heads, num_slots
        if key not in self.slots:
            places = [
                (text, length + step)
                for text, (length, path) in enumerate(zip(self.lengths, self.paths, strict=True))
                for step in range(len(path))
            ]
            self.slots[key] = slots_of(places, num_heads, num_slots)
        return self.slots[key]


class KeyRowsView:
    """Stands in for a layer's cache during a call.

    Args:
        base: The layer's rows.
        layout: What the call's layers share.
    """

    def __init__(self, base: KeyRows, layout: RowsLayout):
        self.base, self.layout = base, layout
        self.base.reserve(layout.longest + layout.num_nodes)

    @property
    def offset(self) -> Int[mx.array, "..."]:
        """Position of every node."""
        return self.layout.offset

    def make_mask(
        self, num_tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Bool[mx.array, "B 1 N S"]:
        """Return which slots of its row every node attends to."""
        masks = self.layout.masks
        if window_size not in masks:
            masks[window_size] = self._mask(window_size)[:, None]
        return masks[window_size]

    def _mask(self, window: int | None) -> Bool[mx.array, "B N S"]:
        layout = self.layout
        at = layout.positions[..., None]
        if layout.mask is None:
            slots = mx.arange(layout.longest + layout.num_nodes)
            seen = slots <= at
            return seen if window is None else seen & (slots > at - window)
        slots, inside = mx.arange(layout.longest), layout.mask
        seen = slots < layout.starts[:, None, None]
        if window is not None:
            seen = seen & (slots > at - window)
            inside = inside & (layout.positions[:, None] > at - window)
        before = (*inside.shape[:2], layout.longest)
        return mx.concatenate([mx.broadcast_to(seen, before), inside], axis=-1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the nodes' keys and values; return them behind the cached ones."""
        self.nodes = keys, values
        if self.layout.mask is None:
            slots = self.layout.moved(keys.shape[1], self.base.num_slots)
            self.base.write([_by_token(x).flatten(0, 1) for x in self.nodes], slots)
        else:
            self.base.place(self.nodes, self.layout.longest)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what ``update_and_fetch`` returned; layers that borrow keys ask for it."""
        return self.base.upto(self.layout.longest + self.layout.num_nodes)

    def commit(self, paths: Paths) -> None:
        """Write the accepted nodes where they belong."""
        if self.layout.mask is None:
            return
        texts, numbers = paths.nodes
        slots = paths.moved(self.nodes[0].shape[1], self.base.num_slots)
        self.base.write([_by_token(x)[texts, numbers] for x in self.nodes], slots)


def _by_token(x: mx.array) -> mx.array:
    """Turn (B, H, N, D) into (B, N, H, D)."""
    return x.swapaxes(1, 2)
