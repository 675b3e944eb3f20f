"""The rows of all layers: what several texts have before the next call.

    text 1   a b c d e . . .      length 5      what lies behind a row's length is nothing:
    text 2   x y . . . . . .      length 2      whoever writes there may be interrupted
    text 3   p q r . . . . .      length 3

mlx-lm's caches of batches have one place to write for all rows, so a text that goes ahead of
another would move all of them. Here a text grows by itself, whatever the others do; joining pads
behind, leaving takes rows, and a row is a text's own cache whenever that is asked for.
"""

from collections.abc import Hashable, Sequence

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_distill.target.batch.key_rows import KeyRows
from mlx_distill.target.batch.state_rows import StateRows
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.window import InTreeLayout


class ListRows:
    """The rows of a layer with several caches.

    Args:
        parts: Of each of them.
    """

    def __init__(self, parts: Sequence["LayerRows"]):
        self.parts = list(parts)

    def take(self, texts: Sequence[int]) -> "ListRows":
        """Return the rows of some texts."""
        return ListRows([part.take(texts) for part in self.parts])

    def give(self, text: int, length: int, cache: CacheList) -> None:
        """Let a text's caches hold the first tokens of its row."""
        for part, own in zip(self.parts, cache.caches, strict=True):
            part.give(text, length, own)

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed."""
        return [x for part in self.parts for x in part.arrays]


LayerRows = KeyRows | StateRows | ListRows


class Rows:
    """The rows of all layers.

    Args:
        layers: One per layer.
        lengths: Of the texts, in tokens.
    """

    def __init__(self, layers: Sequence[LayerRows], lengths: Sequence[int]):
        self.layers, self.lengths = list(layers), tuple(lengths)

    @classmethod
    def of(cls, caches: Sequence[LayerCache], length: int) -> "Rows":
        """Return the rows of one text, of its caches; see ``kind_of``."""
        return cls([_row_of(cache, length) for cache in caches], [length])

    @classmethod
    def read(cls, caches: Sequence[LayerCache], lengths: Sequence[int]) -> "Rows":
        """Return the rows of caches that have read several texts, padded behind.

        Windows have to have read them at once, and states only texts of one length.
        """
        return cls([_rows_read(cache, lengths) for cache in caches], lengths)

    def join(self, other: "Rows") -> None:
        """Add the rows of other texts below."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            _joined(layer, more, self.lengths, other.lengths)
        self.lengths += other.lengths

    def take(self, texts: Sequence[int]) -> "Rows":
        """Return the rows of some texts."""
        layers = [layer.take(texts) for layer in self.layers]
        return Rows(layers, [self.lengths[text] for text in texts])

    def give(self, text: int, length: int, caches: Sequence[LayerCache]) -> None:
        """Let a text's caches hold the first ``length`` tokens of its row."""
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.give(text, length, cache)


def _row_of(cache: LayerCache, length: int) -> LayerRows:
    if isinstance(cache, CacheList):
        return ListRows([_row_of(part, length) for part in cache.caches])
    return StateRows.of(cache, [length]) if type(cache) is ArraysCache else KeyRows.of(cache)


def _rows_read(cache: LayerCache, lengths: Sequence[int]) -> LayerRows:
    if isinstance(cache, CacheList):
        return ListRows([_rows_read(part, lengths) for part in cache.caches])
    if type(cache) is ArraysCache:
        return StateRows.of(cache, lengths)
    return KeyRows.read(cache, lengths)


def _joined(
    layer: LayerRows, more: LayerRows, lengths: Sequence[int], others: Sequence[int]
) -> None:
    """Add the rows of other texts below; both have lengths."""
    if isinstance(layer, ListRows) and isinstance(more, ListRows):
        for part, other in zip(layer.parts, more.parts, strict=True):
            _joined(part, other, lengths, others)
    elif isinstance(layer, StateRows) and isinstance(more, StateRows):
        layer.join(more)
    else:
        assert isinstance(layer, KeyRows)
        assert isinstance(more, KeyRows)
        layer.join(more, lengths, others)


def kind_of(caches: Sequence[LayerCache]) -> Hashable | None:
    """Return what the caches of texts have in common that share calls; None if they cannot."""
    kinds = [_kind(cache) for cache in caches]
    return None if None in kinds else tuple(kinds)


def packed_kind(kind: Hashable, group_size: int, bits: int) -> Hashable:
    """Return the kind of rows whose keys and values have been quantised."""
    assert isinstance(kind, tuple)
    return tuple(("packed", group_size, bits) if one == "keys" else one for one in kind)


def _kind(cache: LayerCache) -> Hashable | None:
    if type(cache) is KVCache:
        return "keys"
    if type(cache) in (RotatingKVCache, InTreeLayout):
        return "window", cache.keep, cache.max_size
    if type(cache) is QuantizedKVCache:
        return "packed", cache.group_size, cache.bits
    if type(cache) is ArraysCache and cache.left_padding is None and cache.lengths is None:
        return "states", len(cache.cache)
    if isinstance(cache, CacheList):
        return kind_of(cache.caches)
    return None
