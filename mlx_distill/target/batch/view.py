"""One layer's rows of several texts, seen by the nodes of their trees during one call.

Where every text reads one token, it is written where it stays. The nodes of trees are written
behind the longest row first, side by side, which is one copy for all texts; what is accepted of
them is then written once more, where each text needs it:

    length 3   a b c . . | N N N        accepted N0, N2        a b c N0 N2
    length 5   p q r s t | M M M                 M0            p q r s t M0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Int, Integer

from mlx_distill.target.batch.key_rows import Fetched, KeyRows


@dataclass(frozen=True)
class RowsLayout:
    """What every layer of one call shares.

    Args:
        mask: The trees' masks; None where every text reads one token.
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

    def slots(self, rows: KeyRows) -> Integer[mx.array, " R"]:
        """Return where single tokens lie in the rows of a layer."""
        key = ("slots", rows.parts[0].shape[1], rows.num_slots, rows.ring)
        if key not in self.masks:
            self.masks[key] = rows.slots_of(list(enumerate(self.lengths)))
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
    known: dict[object, mx.array] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def nodes(self) -> tuple[Int[mx.array, " T"], Int[mx.array, " T"]]:
        """The text and the number of every accepted node."""
        nodes = [(text, node) for text, path in enumerate(self.paths) for node in path]
        texts, numbers = (mx.array(list(x)) for x in zip(*nodes, strict=True))
        return texts, numbers

    def slots(self, rows: KeyRows) -> Integer[mx.array, " R"]:
        """Return where they belong in the rows of a layer."""
        key = rows.parts[0].shape[1], rows.num_slots, rows.ring
        if key not in self.known:
            places = [
                (text, length + step)
                for text, (length, path) in enumerate(zip(self.lengths, self.paths, strict=True))
                for step in range(len(path))
            ]
            self.known[key] = rows.slots_of(places)
        return self.known[key]


class KeyRowsView:
    """Stands in for a layer's cache during a call.

    Args:
        base: The layer's rows.
        layout: What the call's layers share.
    """

    def __init__(self, base: KeyRows, layout: RowsLayout):
        self.base, self.layout = base, layout
        num_nodes, ring = layout.num_nodes, base.ring
        if not ring.is_endless:  # for two trees: the last path may be taken back
            base.make_room(2 * num_nodes, layout.lengths)
            ring = base.ring
        # Single tokens have their slots; nodes lie behind all slots that hold a text.
        self.behind = ring.used(layout.longest)
        self.end = self.behind + num_nodes if num_nodes > 1 else ring.used(layout.longest + 1)
        base.reserve(self.end)

    def __getattr__(self, name: str) -> object:
        # Whether a cache has bits tells attention that its keys are packed.
        if name in ("bits", "group_size") and self.base.packing is not None:
            return getattr(self.base.packing, name)
        raise AttributeError(name)

    @property
    def offset(self) -> Int[mx.array, "..."]:
        """Position of every node."""
        return self.layout.offset

    def make_mask(
        self, num_tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Bool[mx.array, "B 1 N S"]:
        """Return which slots of its row every node attends to."""
        masks, key = self.layout.masks, (window_size, self.base.ring)
        if key not in masks:
            masks[key] = self._mask(window_size)[:, None]
        return masks[key]

    def _mask(self, window: int | None) -> Bool[mx.array, "B N S"]:
        layout, ring = self.layout, self.base.ring
        single = layout.mask is None
        at, reach = layout.positions[..., None], ring.reach(window)
        read = int(single)  # a single token has its slot already
        num_slots = self.end if single else self.behind
        held, seen = ring.held(num_slots, layout.starts + read, layout.longest + read)
        seen, held = (x[:, None] if x.ndim > 1 else x for x in (seen, held))
        if reach is not None:
            seen = seen & ((held > at - reach) | (held < ring.keep))
        if layout.mask is None:
            return seen
        inside = layout.mask
        if reach is not None:
            nodes = layout.positions[:, None]
            inside = inside & ((nodes > at - reach) | (nodes < ring.keep))
        before = (*inside.shape[:2], num_slots)
        return mx.concatenate([mx.broadcast_to(seen, before), inside], axis=-1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Write the nodes' keys and values; return them behind the cached ones."""
        self.nodes = self.base.packed(keys, values)
        if self.layout.mask is None:
            self.base.write([x.squeeze(2) for x in self.nodes], self.layout.slots(self.base))
        else:
            self.base.place(self.nodes, self.behind)
        return self.keys_and_values()

    def keys_and_values(self) -> Fetched:
        """Return what ``update_and_fetch`` returned; layers that borrow keys ask for it."""
        return self.base.upto(self.end)

    def commit(self, paths: Paths) -> None:
        """Write the accepted nodes where they belong."""
        if self.layout.mask is None:
            return
        texts, numbers = paths.nodes
        tokens = [x.swapaxes(1, 2)[texts, numbers] for x in self.nodes]
        self.base.write(tokens, paths.slots(self.base))
