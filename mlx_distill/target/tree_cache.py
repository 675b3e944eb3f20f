"""One layer's KV cache seen by the nodes of a tree: mask, positions, append, commit, rewind.

An mlx-lm model asks its cache for three things: the attention mask (``make_mask``), the position of
the new tokens (``offset``) and the keys to attend to (``update_and_fetch``). A ``TreeCache`` stands
in for the cache during one call and answers for the nodes of a tree instead of a run of text. After
the call, ``commit`` keeps the accepted path, so that the cache holds what plain decoding would.

Two layouts, chosen by the target:

* *row*: the nodes are the sequence axis, as tokens of a prompt are. ``offset`` is then one position
  per node, which the wrapped rope modules understand (``tree_rope``).
* *batch*: every node is a batch row of length one. ``offset`` is one position per batch row, which
  every mlx-lm model understands, because that is how it decodes batches.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Bool
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache

from mlx_distill.target.copies import CopiedCache, PathRows
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.recurrent.view import RecurrentTreeCache
from mlx_distill.target.restoring import APPENDING, before_next_chunk, restore, state_of
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.window import InTreeLayout, move_into, window_of

# Keys and values, or what stands for them: quantised ones are tuples.
Fetched = tuple[object, object] | None

BRANCHING = (*APPENDING, RotatingKVCache, InTreeLayout)


class TreeCache:
    """A cache that appends: plain, quantised and chunked KV."""

    def __init__(self, base: LayerCache, layout: TreeLayout):
        self.base = base
        self.layout = layout
        self.begin = _length(base)
        self.after: object | None = None

    def __getattr__(self, name: str) -> object:
        # What this class does not answer (bits, group_size, ...) is asked of the cache itself.
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: object) -> None:
        # Some models tidy up the arrays of their cache.
        if name in ("keys", "values"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def offset(self) -> mx.array | int:
        """Position of every node; of a single one, a number, as in plain decoding."""
        return self.layout.positions if self.layout.depths.size > 1 else self.layout.start

    def make_mask(
        self, num_tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Bool[mx.array, "..."] | None:
        """Return which cached tokens and which nodes every node attends to.

        A root alone is a token like any other, so the cache itself answers.
        """
        if self.layout.depths.size == 1 and hasattr(self.base, "make_mask"):
            return self.base.make_mask(
                num_tokens, window_size=window_size, return_array=return_array
            )
        return _mask(self.layout, self.begin, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append the nodes' keys and values; return them behind the cached ones."""
        batched = self.layout.batched
        self.nodes = tuple(_to_sequence(x) if batched else x for x in (keys, values))
        return self._broadcast(self.base.update_and_fetch(*self.nodes))

    def keys_and_values(self) -> Fetched:
        """Return what ``update_and_fetch`` returned; layers that borrow keys ask for it."""
        return self._broadcast(self.base.keys_and_values())

    def _broadcast(self, fetched: Fetched) -> Fetched:
        """Return keys and values for every batch row, where nodes are batch rows."""
        if not self.layout.batched:
            return fetched
        nodes = self.layout.depths.size
        return tree_map(lambda x: mx.broadcast_to(x, (nodes, *x.shape[1:])), fetched)

    def commit(self, path: list[int]) -> bool:
        """Keep the nodes of the accepted path, in their order, and drop the others.

        Return whether the cache holds the path now: False asks for a replay (``ReplayedCache``).

        The path is written once more, from the nodes themselves: reading it back out of the cache
        would keep a second hold on the cache's memory and make MLX copy all of it to write.
        """
        begin = next((i for i, node in enumerate(path) if node != i), len(path))
        self.rewind(begin)
        while begin < len(path):  # runs of nodes side by side are views: no gather
            node, end = path[begin], begin + 1
            while end < len(path) and path[end] == node + end - begin:
                end += 1
            rows = slice(node, node + end - begin)
            self.base.update_and_fetch(*(x[..., rows, :] for x in self.nodes))
            begin = end
        self.after = before_next_chunk(self.base, self.layout.start, self.layout.start + len(path))
        return True

    def rewind(self, num_tokens: int) -> bool:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        if self.after is not None:
            restore(self.base, self.after)
        self.base.offset = self.layout.start + num_tokens
        return True


class RotatingTreeCache(TreeCache):
    """A sliding-window cache: the tree is written into the room beside the window."""

    def __init__(self, base: RotatingKVCache, layout: TreeLayout):
        super().__init__(base, layout)
        self.num_nodes = layout.depths.size
        self.window = window_of(base, self.num_nodes)
        self.window.reserve(layout.start + self.num_nodes)

    def make_mask(
        self, num_tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Bool[mx.array, "..."]:
        """Return which slots of the window every node attends to."""
        ring, masks = self.window, self.layout.masks
        size = min(window_size or ring.size, ring.size) if ring.keep == 0 else ring.size - ring.keep
        key = (ring.length, ring.oldest, ring.capacity, ring.keep, size)
        if key not in masks:
            mask = self._mask(size)
            masks[key] = mask[:, None, None, :] if self.layout.batched else mask
        return masks[key]

    def _mask(self, size: int) -> Bool[mx.array, "N S"]:
        """Return the mask of a window that reaches over ``size`` tokens."""
        start, keep = self.layout.start, self.window.keep
        nodes = self.window.slots(start, start + self.num_nodes)
        held = self.window.held(start)
        if self.num_nodes == 1:  # the host knows where a root is
            held[nodes] = start
            seen: Bool[np.ndarray, " S"] = (held >= 0) & ((held > start - size) | (held < keep))
            return mx.array(seen)[None]
        held[nodes] = -1
        at = self.layout.positions
        node_of = np.full(self.window.length, self.num_nodes)  # the column of zeros
        node_of[nodes] = np.arange(self.num_nodes)
        past = mx.array(held)
        cached = (past >= 0) & ((past > at[:, None] - size) | (past < keep))
        inside = self.layout.mask & ((at > at[:, None] - size) | (at < keep))
        inside = mx.pad(inside, [(0, 0), (0, 1)])
        return cached | inside[:, mx.array(node_of)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Write the nodes' keys and values; return the window's."""
        batched = self.layout.batched
        self.nodes = tuple(_to_sequence(x) if batched else x for x in (keys, values))
        self.window.write(self.nodes, self.layout.start)
        return self.keys_and_values()

    def keys_and_values(self) -> Fetched:
        """Return what ``update_and_fetch`` returned; layers that borrow keys ask for it."""
        return self._broadcast(self.window.arrays)

    def commit(self, path: list[int]) -> bool:
        """Keep the nodes of the accepted path, in their order, and drop the others."""
        if path != list(range(len(path))):
            rows = mx.array(path)
            self.window.write([mx.take(x, rows, axis=-2) for x in self.nodes], self.layout.start)
        return self.rewind(len(path))

    def rewind(self, num_tokens: int) -> bool:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree.

        If the cache was given its own layout since, it is given the window again: there a token
        that was read takes the place of one that the text then still needs.
        """
        move_into(self.window, self.base)
        return super().rewind(num_tokens)


class ReplayedCache:
    """A cache that can take nothing back: it goes back to before the call.

    Unless the path is all that was read, it is then to be read again, by all layers.
    """

    def __init__(self, base: LayerCache, layout: TreeLayout):
        self.base = base
        self.layout = layout
        self.before = state_of(base)

    def commit(self, path: list[int]) -> bool:
        """Return whether the path is all that was read, so that the state is right as it is."""
        return len(path) == self.layout.depths.size

    def rewind(self, num_tokens: int) -> bool:
        """Go back to before the call; return whether that is what was asked for."""
        restore(self.base, self.before)
        return num_tokens == 0


class TreeCacheList:
    """The tree's view of a layer with several caches."""

    def __init__(self, base: CacheList, caches: Sequence["TreeView"]):
        self.base = base
        self.caches = caches

    def __getitem__(self, index: int) -> "TreeView":
        return self.caches[index]

    def commit(self, path: list[int]) -> bool:
        """Commit every cache."""
        return all(cache.commit(path) for cache in self.caches)

    def rewind(self, num_tokens: int) -> bool:
        """Rewind every cache."""
        return all(cache.rewind(num_tokens) for cache in self.caches)


TreeView = TreeCache | RecurrentTreeCache | ReplayedCache | CopiedCache | TreeCacheList


def tree_cache(base: LayerCache, layout: TreeLayout) -> TreeView:
    """Return the view of one layer's cache for one tree call."""
    if isinstance(base, CacheList):
        return TreeCacheList(base, [tree_cache(cache, layout) for cache in base.caches])
    if layout.as_text and type(base) not in APPENDING:
        return ReplayedCache(base, layout)
    if type(base) is ArraysCache:
        return RecurrentTreeCache(base, layout)
    return (RotatingTreeCache if isinstance(base, RotatingKVCache) else TreeCache)(base, layout)


def copied_cache(
    base: LayerCache, read: LayerCache, layout: TreeLayout, rows: PathRows
) -> CopiedCache | TreeCacheList:
    """Return the view of one layer's cache whose copy read the paths of a tree."""
    if isinstance(base, CacheList):
        parts = zip(base.caches, read.caches, strict=True)
        return TreeCacheList(base, [copied_cache(*part, layout, rows) for part in parts])
    return CopiedCache(base, read, layout, rows)


def can_branch(cache: LayerCache) -> bool:
    """Return whether there is a view of a cache for a tree; of padded states there is none."""
    if isinstance(cache, CacheList):
        return all(can_branch(part) for part in cache.caches)
    if type(cache) is ArraysCache:
        return cache.left_padding is None and cache.lengths is None
    return type(cache) in BRANCHING


def can_trim(cache: LayerCache) -> bool:
    """Return whether a cache can drop its latest tokens at any length."""
    if isinstance(cache, CacheList):
        return all(can_trim(part) for part in cache.caches)
    return type(cache) in APPENDING


def _mask(layout: TreeLayout, past: int, window: int | None) -> Bool[mx.array, "..."]:
    """Return the mask of the cached tokens and the nodes; layers with equal caches share one.

    ``past`` counts the cached tokens. With a window, a token is visible to a node when it is less
    than ``window`` positions before it.
    """
    key = (past, window)
    if key not in layout.masks:
        visible = mx.ones((layout.depths.size, past), dtype=mx.bool_)
        inside = layout.mask
        if window is not None:
            first = layout.positions[:, None] - window
            visible = mx.arange(layout.start - past, layout.start) > first
            inside = inside & (layout.positions > first)
        mask = mx.concatenate([visible, inside], axis=1)
        layout.masks[key] = mask[:, None, None, :] if layout.batched else mask
    return layout.masks[key]


def _length(base: LayerCache) -> int:
    """Return how many slots an appending cache holds."""
    return base.offset - getattr(base, "start_position", 0)


def _to_sequence(x: mx.array) -> mx.array:
    """Turn nodes on the batch axis, (N, H, 1, D), into a sequence, (1, H, N, D)."""
    return x.transpose(2, 1, 0, 3)
