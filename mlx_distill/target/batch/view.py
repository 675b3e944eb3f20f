"""One layer's rows of several texts, seen by the nodes of their trees during one call.

Where every text reads one token, it is written where it stays. The nodes of trees are written
behind the longest row first, side by side, which is one copy for all texts; what is accepted of
them is then written once more, where each text needs it:

    length 3   a b c . . | N N N        accepted N0, N2        a b c N0 N2
    length 5   p q r s t | M M M                 M0            p q r s t M0

The nodes of trees that differ in size may come as one list, as if of a single text: what works row
by row is spared the padding then, and only attention takes them apart (``attention``).
"""

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Bool, Int

from mlx_distill.target.batch.key_rows import Fetched, KeyRows
from mlx_distill.target.batch.layout import Paths, RowsLayout
from mlx_distill.target.batch.rows import LayerRows, ListRows
from mlx_distill.target.batch.state_rows import StateRows, StateRowsView


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
        if self.layout.packing is not None:
            keys, values = map(self.layout.packing.rows, (keys, values))
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


class ListView:
    """Stands in for a layer with several caches during a call.

    Args:
        views: Stand in for each of them.
    """

    def __init__(self, views: Sequence["RowsView"]):
        self.views = views

    def __getitem__(self, index: int) -> "RowsView":
        return self.views[index]

    def commit(self, paths: Paths) -> None:
        """Commit all of them."""
        for view in self.views:
            view.commit(paths)


RowsView = KeyRowsView | StateRowsView | ListView


def view_of(rows: LayerRows, layout: RowsLayout) -> RowsView:
    """Return what stands in for the cache of a layer during a call."""
    if isinstance(rows, ListRows):
        return ListView([view_of(part, layout) for part in rows.parts])
    if isinstance(rows, StateRows):
        return StateRowsView(rows, layout)
    return KeyRowsView(rows, layout)
