"""A sliding window with room for a tree beside it, so that drafting copies no keys.

mlx-lm's rotating cache has as many slots as its window, so a tree has no place in it: its nodes
would overwrite tokens that the root still sees. Here the ring has some slots more. A token's slot
follows from its position, and what a slot holds follows from its number, so masks are made of
positions; the order of the slots does not matter, for keys are rotated before they are cached.

    keep 2, 3 more in the window, room 2     slots   0  1 | 2  3  4  5  6
    14 tokens, then nodes x and y            hold    0  1 | x  y 11 12 13     (x replaced token 9)

Whatever asks a cache in this layout for its arrays, plain decoding among it, gets mlx-lm's back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from mlx_lm.models.cache import RotatingKVCache

from mlx_distill.compat import RING_NAMES, ring_index, set_ring
from mlx_distill.target.layer_cache import LayerCache, leaves

ROOM, STEP = 32, 256

KeysAndValues = tuple[Float[mx.array, "1 H S D"], Float[mx.array, "1 H S E"]]


class Window:
    """The ring of one layer.

    Args:
        keep: The first so many tokens of the text always stay.
        size: Tokens in the window, those among them.
        room: How many more slots there are.
    """

    def __init__(self, keep: int, size: int, room: int):
        self.keep = keep
        self.size = size
        self.capacity = size + room
        self.length = 0  # slots there are by now
        self.oldest = keep  # of the tokens that do not stay, those before this are overwritten
        self.arrays: KeysAndValues | None = None

    @classmethod
    def of(cls, cache: RotatingKVCache, room: int) -> "Window":
        """Return a window with the content of mlx-lm's cache, which is copied once."""
        window = cls(cache.keep, cache.max_size, room)
        if cache.keys is not None and cache.values is not None and cache.offset:
            content = (temporal(cache, cache.keys), temporal(cache, cache.values))
            keys, values = (tail(x, cache.keep, cache.max_size) for x in content)
            window.fill(keys, values, cache.offset)
        return window

    def fill(self, keys: mx.array, values: mx.array, num_tokens: int) -> None:
        """Put the latest tokens of a text into the empty window, behind those that stay."""
        stay = min(self.keep, num_tokens)
        recent = keys.shape[2] - stay
        self.write((keys[..., :stay, :], values[..., :stay, :]), 0, num_tokens)
        self.write((keys[..., stay:, :], values[..., stay:, :]), num_tokens - recent)
        self.oldest = max(self.oldest, num_tokens - recent)

    def reserve(self, num_tokens: int) -> None:
        """Have slots for a text of so many tokens, as far as there are to be any."""
        if num_tokens > self.length:
            self.length = min(self.capacity, -(-num_tokens // STEP) * STEP)

    def write(self, rows: Sequence[mx.array], start: int, num_tokens: int = 0) -> KeysAndValues:
        """Write tokens from a position on, and return the arrays."""
        end = start + rows[0].shape[2]
        self.reserve(max(end, num_tokens))
        keys, values = (
            self._grown(old, new)
            for old, new in zip(self.arrays or (None, None), rows, strict=True)
        )
        # A second hold on an array would make MLX copy it to write.
        self.arrays = None
        for slot, first, last in self._runs(start, end):
            here, there = slice(slot, slot + last - first), slice(first, last)
            keys[..., here, :] = rows[0][..., there, :]
            values[..., here, :] = rows[1][..., there, :]
        self.arrays = keys, values
        self.oldest = max(self.oldest, end - (self.capacity - self.keep))
        return self.arrays

    def held(self, num_tokens: int) -> Int[np.ndarray, " S"]:
        """Return the position of the token that every slot holds, -1 where it holds none."""
        slots, ring, last = np.arange(self.length), self.capacity - self.keep, num_tokens - 1
        position = last - (last - slots) % ring
        position = np.where(position >= self.oldest, position, -1)
        return np.where(slots < self.keep, np.where(slots < num_tokens, slots, -1), position)

    def slots(self, start: int, end: int) -> Int[np.ndarray, " N"]:
        """Return where the tokens at positions from ``start`` to ``end`` lie."""
        positions, ring = np.arange(start, end), self.capacity - self.keep
        return np.where(
            positions < self.keep, positions, self.keep + (positions - self.keep) % ring
        )

    def in_order(self, num_tokens: int) -> KeysAndValues | None:
        """Return the window of a text of so many tokens in its order."""
        if self.arrays is None or num_tokens == 0:
            return None
        stay = min(self.keep, num_tokens)
        first = max(stay, self.oldest, num_tokens - (self.size - stay))
        spans = [(0, stay)] if stay else []
        runs = self._runs(first, num_tokens)
        spans += [(slot, slot + last - before) for slot, before, last in runs]
        keys, values = (
            mx.concatenate([x[..., begin:end, :] for begin, end in spans], axis=2)
            for x in self.arrays
        )
        return keys, values

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield runs of slots: the first slot, and which of the tokens lie there."""
        position = start
        while position < end:
            slot = int(self.slots(position, position + 1)[0])
            limit = self.keep if position < self.keep else self.capacity
            num = min(end - position, limit - slot)
            yield slot, position - start, position - start + num
            position += num

    def _grown(self, old: mx.array | None, new: mx.array) -> mx.array:
        shape = (*new.shape[:2], self.length, new.shape[3])
        if old is None:
            return mx.zeros(shape, new.dtype)
        if old.shape[2] == self.length:
            return old
        more = mx.zeros((*shape[:2], self.length - old.shape[2], shape[3]), old.dtype)
        return mx.concatenate([old, more], axis=2)


class InTreeLayout(RotatingKVCache):
    """A rotating cache whose content is in a ``Window`` at the moment."""

    def __getattr__(self, name: str) -> object:
        if name not in RING_NAMES:
            raise AttributeError(name)
        settle(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in RING_NAMES:
            settle(self)
        object.__setattr__(self, name, value)

    def trim(self, n: int) -> int:
        """Drop the latest tokens, as the cache in its own layout does."""
        settle(self)
        return self.trim(n)


# What mlx-lm saves with a cache is its class's name.
InTreeLayout.__name__ = RotatingKVCache.__name__


class AsSteps(RotatingKVCache):
    """A rotating cache that lets several tokens see what each would see in a step of its own.

    mlx-lm's mask lets the first tokens go, which are to stay, where the oldest others should.
    """

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return which slots each of ``N`` tokens attends to."""
        if N == 1 or window_size or self.offset + N <= self.max_size:
            return super().make_mask(N, window_size, return_array)
        past = min(self.offset, self.max_size - 1)
        slots = mx.arange(past + N)
        held = mx.where(slots < self.keep, slots, slots + self.offset - past)
        own = mx.arange(self.offset, self.offset + N)[:, None]
        recent = held > own - (self.max_size - self.keep)
        return (held <= own) & (recent | (held < self.keep))


@contextmanager
def as_steps(caches: Sequence[LayerCache]) -> Iterator[None]:
    """Let windows that keep their first tokens be ``AsSteps``, within."""
    rings = [one for one in leaves(caches) if type(one) is RotatingKVCache and one.keep]
    try:
        for ring in rings:
            ring.__class__ = AsSteps
        yield
    finally:
        for ring in rings:
            ring.__class__ = RotatingKVCache


def own_class(cache: RotatingKVCache) -> None:
    """Let a window be what it was, where ``as_steps`` was interrupted."""
    if cache.__class__ is AsSteps:
        cache.__class__ = RotatingKVCache


def window_of(cache: RotatingKVCache, num_nodes: int) -> Window:
    """Return the window that holds a cache's content, with room for trees; it stays there.

    There is room for two: what a tree made text may be taken back when the next one is written.
    """
    window = vars(cache).get("window")
    if window is not None and 2 * num_nodes <= window.capacity - window.size:
        return window
    window = Window.of(cache, max(ROOM, 2 * num_nodes))
    move_into(window, cache)
    return window


def move_into(window: Window, cache: RotatingKVCache) -> None:
    """Let a window hold a cache's content, whatever held it before."""
    if vars(cache).get("window") is not window:
        for name in RING_NAMES:
            vars(cache).pop(name, None)
        cache.__class__ = InTreeLayout
        vars(cache)["window"] = window  # at last: an interrupt leaves it undone, not half done


def settle(cache: RotatingKVCache) -> None:
    """Give a cache its own layout back; that copies the window once."""
    window: Window = vars(cache).pop("window")
    cache.__class__ = RotatingKVCache
    keys, values = window.in_order(cache.offset) or (None, None)
    set_ring(cache, keys, values)


def temporal(cache: RotatingKVCache, x: mx.array) -> mx.array:
    """Return the ring's content in the order of the text.

    The ring is full up to its length once it has turned.
    """
    index = ring_index(cache)
    if index == x.shape[2] or index >= cache.offset:
        return x[..., :index, :]
    keep = cache.keep
    return mx.concatenate([x[..., :keep, :], x[..., index:, :], x[..., keep:index, :]], axis=2)


def tail(x: mx.array, keep: int, size: int) -> mx.array:
    """Return the first ``keep`` tokens and the latest others, ``size`` in all at the most."""
    excess = x.shape[2] - size
    if excess <= 0:
        return x
    if keep == 0:
        return x[..., excess:, :]
    return mx.concatenate([x[..., :keep, :], x[..., keep + excess :, :]], axis=2)
