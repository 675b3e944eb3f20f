"""Keys and values of several texts in one layer: a row each, as long as its text.

Packed ones are three arrays each, as in mlx-lm's quantised cache. A window's lie around a ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Integer
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlx_distill.compat import set_ring
from mlx_distill.target.batch.ring import ENDLESS, Ring
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.window import tail, temporal

STEP = 256  # slots that are made at once

# (B, H, S, _) each: the keys and the values, or three of each.
Parts = Sequence[mx.array]
Fetched = tuple[object, object]


@dataclass(frozen=True)
class Packing:
    """How keys and values are quantised.

    Args:
        group_size: Of the numbers that share a scale.
        bits: Of a number.
    """

    group_size: int
    bits: int


class KeyRows:
    """The rows of one layer.

    Args:
        parts: The arrays.
        ring: Where a token lies in its row.
        packing: How they are quantised; None if they are not.
    """

    def __init__(self, parts: Parts, ring: Ring = ENDLESS, packing: Packing | None = None):
        self.parts, self.ring, self.packing = list(parts), ring, packing

    @classmethod
    def of(cls, cache: KVCache | RotatingKVCache | QuantizedKVCache) -> "KeyRows":
        """Return a row that holds what a text's cache does."""
        assert cache.keys is not None
        assert cache.values is not None
        if isinstance(cache, QuantizedKVCache):
            parts = [*cache.keys, *cache.values]
            packing = Packing(cache.group_size, cache.bits)
            return cls([x[..., : cache.offset, :] for x in parts], packing=packing)
        if isinstance(cache, KVCache):
            return cls([x[..., : cache.offset, :] for x in (cache.keys, cache.values)])
        ring = Ring.of_window(cache.keep, cache.max_size)
        in_order = (temporal(cache, x) for x in (cache.keys, cache.values))
        parts = [tail(x, cache.keep, cache.max_size) for x in in_order]
        stay = min(cache.keep, cache.offset)
        recent = parts[0].shape[2] - stay
        latest = range(cache.offset - recent, cache.offset)
        places = [(0, position) for position in (*range(stay), *latest)]
        return cls.filled([_by_token(x).flatten(0, 1) for x in parts], places, 1, ring)

    @classmethod
    def read(cls, cache: KVCache | RotatingKVCache, lengths: Sequence[int]) -> "KeyRows":
        """Return the rows of a cache that has read the beginnings of texts, padded behind.

        A window has to have read them at once.
        """
        assert cache.keys is not None
        assert cache.values is not None
        if isinstance(cache, KVCache):
            return cls([cache.keys, cache.values])
        rows = cls([x[..., : cache.offset, :] for x in (cache.keys, cache.values)])
        return rows.laid_out(Ring.of_window(cache.keep, cache.max_size), lengths)

    @classmethod
    def filled(
        cls,
        tokens: Parts,
        places: Sequence[tuple[int, int]],
        num_texts: int,
        ring: Ring,
        packing: Packing | None = None,
    ) -> "KeyRows":
        """Return rows that hold tokens, (T, H, _); ``places`` are their texts and positions."""
        longest = 1 + max((position for _, position in places), default=0)
        num_slots = min(ring.capacity, -(-longest // STEP) * STEP)
        empty = [mx.zeros((num_texts, x.shape[1], num_slots, x.shape[2]), x.dtype) for x in tokens]
        rows = cls(empty, ring, packing)
        if places:
            rows.write(tokens, rows.slots_of(places))
        return rows

    @property
    def num_slots(self) -> int:
        """How many tokens a row has room for."""
        return self.parts[0].shape[2]

    def slots_of(self, places: Sequence[tuple[int, int]]) -> Integer[mx.array, " R"]:
        """Return where tokens lie in the rows, head by head, that are one axis.

        Args:
            places: Of each token its text and its position.
        """
        num_heads = self.parts[0].shape[1]
        texts, positions = np.array(places, np.int64).T
        rows = texts[:, None] * num_heads + np.arange(num_heads)
        slots = rows * self.num_slots + self.ring.slots(positions)[:, None]
        return mx.array(slots.reshape(-1).astype(np.uint32))

    def reserve(self, num_slots: int) -> None:
        """Have so many slots."""
        more = -(-num_slots // STEP) * STEP - self.num_slots
        if num_slots > self.num_slots:
            self.parts = [_longer(x, more) for x in self.parts]

    def write(self, tokens: Parts, slots: Integer[mx.array, " R"]) -> None:
        """Write tokens, (T, H, _), where ``slots_of`` says."""
        self.parts = [_written(x, new, slots) for x, new in zip(self.parts, tokens, strict=True)]

    def place(self, tokens: Parts, slot: int) -> None:
        """Write tokens, (B, H, N, _), side by side from one slot on, the same for all texts."""
        here = slice(slot, slot + tokens[0].shape[2])
        for x, new in zip(self.parts, tokens, strict=True):
            x[..., here, :] = new

    def packed(self, keys: mx.array, values: mx.array) -> Parts:
        """Return keys and values as they are kept."""
        if self.packing is None:
            return keys, values
        size, bits = self.packing.group_size, self.packing.bits
        return [*mx.quantize(keys, size, bits), *mx.quantize(values, size, bits)]

    def upto(self, slot: int) -> Fetched:
        """Return the keys and values before a slot, as attention takes them."""
        return _paired([x[..., :slot, :] for x in self.parts])

    def laid_out(self, ring: Ring, lengths: Sequence[int]) -> "KeyRows":
        """Return the same rows around another ring."""
        held = [
            (text, position)
            for text, length in enumerate(lengths)
            for position in min(self.ring, ring, key=lambda x: x.capacity).present(length)
        ]
        texts, positions = np.array(held, np.int64).reshape(-1, 2).T
        slots = mx.array(self.ring.slots(positions))
        tokens = [_by_token(x)[mx.array(texts), slots] for x in self.parts]
        return KeyRows.filled(tokens, held, len(lengths), ring, self.packing)

    def make_room(self, num_slots: int, lengths: Sequence[int]) -> None:
        """Have so many slots beside a window."""
        ring = self.ring.with_room(num_slots)
        if ring != self.ring:
            self.parts = self.laid_out(ring, lengths).parts
            self.ring = ring

    def join(self, other: "KeyRows", lengths: Sequence[int], others: Sequence[int]) -> None:
        """Add the rows of other texts below; both have lengths."""
        self.make_room(other.ring.room, lengths)
        other.make_room(self.ring.room, others)
        size = max(self.num_slots, other.num_slots)
        self.parts = [
            mx.concatenate([_longer(x, size - x.shape[2]) for x in pair])
            for pair in zip(self.parts, other.parts, strict=True)
        ]

    def take(self, texts: Sequence[int]) -> "KeyRows":
        """Return the rows of some texts."""
        places = mx.array(list(texts))
        return KeyRows([x[places] for x in self.parts], self.ring, self.packing)

    def give(self, text: int, length: int, cache: LayerCache) -> None:
        """Let a text's cache hold the first tokens of its row, or their window."""
        row = slice(text, text + 1)
        if self.ring.is_endless:
            parts = [mx.contiguous(x[row, :, :length]) for x in self.parts]
            cache.keys, cache.values = _paired(parts)
        else:
            slots = mx.array(self.ring.slots(np.array(self.ring.window(length), np.int64)))
            set_ring(cache, *(mx.take(x[row], slots, axis=2) for x in self.parts))
        cache.offset = length

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed."""
        return self.parts


def _paired(parts: Parts) -> Fetched:
    """Return keys and values; quantised ones are tuples."""
    if len(parts) == 2:
        return parts[0], parts[1]
    return tuple(parts[:3]), tuple(parts[3:])


def _by_token(x: mx.array) -> mx.array:
    """Turn (B, H, N, _) into (B, N, H, _)."""
    return x.swapaxes(1, 2)


def _longer(x: mx.array, more: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else x


def _written(x: mx.array, tokens: mx.array, slots: Integer[mx.array, " R"]) -> mx.array:
    """Return rows with tokens written; where nobody else has a hold on them, nothing is copied."""
    flat = x.reshape(-1, x.shape[-1])
    flat[slots] = tokens.reshape(-1, x.shape[-1])
    return flat.reshape(x.shape)
