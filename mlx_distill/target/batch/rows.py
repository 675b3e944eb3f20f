"""Keys and values of several texts: a row each, left-aligned, each as long as its text.

    text 1   a b c d e . . .      length 5      what lies behind a row's length is nothing:
    text 2   x y . . . . . .      length 2      whoever writes there may be interrupted
    text 3   p q r . . . . .      length 3

mlx-lm's caches of batches have one place to write for all rows, so a text that goes ahead of
another would move all of them. Here a text grows by itself, whatever the others do; joining pads
behind, leaving takes rows, and a row is a text's own cache whenever that is asked for.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int, Integer
from mlx_lm.models.cache import KVCache

from mlx_distill.target.layer_cache import LayerCache

STEP = 256  # slots that are made at once

Keys = Float[mx.array, "B H S D"]


class KeyRows:
    """The rows of one layer.

    Args:
        keys: Of all texts.
        values: Of all texts.
    """

    def __init__(self, keys: Keys, values: Keys):
        self.keys, self.values = keys, values

    @classmethod
    def of(cls, cache: KVCache) -> "KeyRows":
        """Return a row that holds what a text's cache does."""
        assert cache.keys is not None
        assert cache.values is not None
        return cls(cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :])

    @property
    def num_slots(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[2]

    def reserve(self, num_slots: int) -> None:
        """Have room for rows of so many tokens."""
        more = -(-num_slots // STEP) * STEP - self.num_slots
        if more > 0:
            self.keys, self.values = (_longer(x, more) for x in (self.keys, self.values))

    def write(self, rows: Sequence[mx.array], slots: Integer[mx.array, " R"]) -> None:
        """Write tokens, (T, H, D), where ``slots_of`` says."""
        self.keys = _written(self.keys, rows[0], slots)
        self.values = _written(self.values, rows[1], slots)

    def place(self, rows: Sequence[mx.array], slot: int) -> None:
        """Write tokens side by side from one slot on, the same for all texts."""
        here = slice(slot, slot + rows[0].shape[2])
        self.keys[..., here, :] = rows[0]
        self.values[..., here, :] = rows[1]

    def upto(self, slot: int) -> tuple[Keys, Keys]:
        """Return the keys and values before a slot."""
        return self.keys[..., :slot, :], self.values[..., :slot, :]

    def join(self, other: "KeyRows") -> None:
        """Add the rows of other texts below."""
        size = max(self.num_slots, other.num_slots)
        both = ((self.keys, other.keys), (self.values, other.values))
        self.keys, self.values = (
            mx.concatenate([_longer(x, size - x.shape[2]) for x in pair]) for pair in both
        )

    def take(self, texts: Int[mx.array, " B"]) -> "KeyRows":
        """Return the rows of some texts."""
        return KeyRows(self.keys[texts], self.values[texts])

    def give(self, text: int, length: int, cache: KVCache) -> None:
        """Let a text's cache hold the first tokens of its row."""
        row = slice(text, text + 1)
        cache.keys, cache.values = (
            mx.contiguous(x[row, :, :length]) for x in (self.keys, self.values)
        )
        cache.offset = length

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed."""
        return [self.keys, self.values]


class Rows:
    """The rows of all layers.

    Args:
        layers: One per layer.
        lengths: Of the texts, in tokens.
    """

    def __init__(self, layers: Sequence[KeyRows], lengths: Sequence[int]):
        self.layers, self.lengths = list(layers), tuple(lengths)

    @classmethod
    def of(cls, caches: Sequence[LayerCache]) -> "Rows":
        """Return the rows of one text, of its caches; see ``can_be_rows``."""
        return cls([KeyRows.of(cache) for cache in caches], [caches[0].offset])

    @classmethod
    def read(cls, caches: Sequence[LayerCache], lengths: Sequence[int]) -> "Rows":
        """Return the rows of caches that have read several texts, padded behind."""
        return cls([KeyRows(cache.keys, cache.values) for cache in caches], lengths)

    def join(self, other: "Rows") -> None:
        """Add the rows of other texts below."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.join(more)
        self.lengths += other.lengths

    def take(self, texts: Sequence[int]) -> "Rows":
        """Return the rows of some texts."""
        places = mx.array(list(texts))
        layers = [layer.take(places) for layer in self.layers]
        return Rows(layers, [self.lengths[text] for text in texts])

    def give(self, text: int, length: int, caches: Sequence[LayerCache]) -> None:
        """Let a text's caches hold the first ``length`` tokens of its row."""
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.give(text, length, cache)


def can_be_rows(caches: Sequence[LayerCache]) -> bool:
    """Return whether the caches of a model can be rows of a batch."""
    return all(type(cache) is KVCache for cache in caches)


def slots_of(
    places: Sequence[tuple[int, int]], num_heads: int, num_slots: int
) -> Integer[mx.array, " R"]:
    """Return where tokens lie in the rows of a layer, head by head, that are one axis.

    Args:
        places: Of each token its text and its slot.
        num_heads: Of the layer.
        num_slots: Of a row.
    """
    texts, slots = np.array(places, np.int64).T
    rows = (texts[:, None] * num_heads + np.arange(num_heads)) * num_slots + slots[:, None]
    return mx.array(rows.reshape(-1).astype(np.uint32))


def _longer(x: Keys, more: int) -> Float[mx.array, "B H _ D"]:
    return mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else x


def _written(x: Keys, tokens: Float[mx.array, "T H D"], slots: Integer[mx.array, " R"]) -> Keys:
    """Return rows with tokens written; where nobody else has a hold on them, nothing is copied."""
    flat = x.reshape(-1, x.shape[-1])
    flat[slots] = tokens.reshape(-1, x.shape[-1])
    return flat.reshape(x.shape)
