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
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlx_distill.target.batch.key_rows import KeyRows
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.window import InTreeLayout


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
        """Return the rows of one text, of its caches; see ``kind_of``."""
        return cls([KeyRows.of(cache) for cache in caches], [caches[0].offset])

    @classmethod
    def read(cls, caches: Sequence[LayerCache], lengths: Sequence[int]) -> "Rows":
        """Return the rows of caches that have read several texts, padded behind."""
        return cls([KeyRows.read(cache, lengths) for cache in caches], lengths)

    def join(self, other: "Rows") -> None:
        """Add the rows of other texts below."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.make_room(more.ring.room, self.lengths)
            more.make_room(layer.ring.room, other.lengths)
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
    return None
