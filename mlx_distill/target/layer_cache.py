"""The caches of a model, a layer each, whatever their kinds.

mlx-lm's have no type in common that says what they can do: some have an offset, some states, some
are lists of others. ``LayerCache`` is the name for one of them; what a function needs of it is
asked at run time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import CacheList

LayerCache = Any


def leaves(caches: Sequence[LayerCache]) -> Iterator[LayerCache]:
    """Yield all caches, also those that a layer with several keeps in a list."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def arrays_of(caches: Sequence[LayerCache]) -> list[object]:
    """Return the arrays of caches as they are; asking a window for its state would turn it."""
    found: list[object] = []
    for cache in leaves(caches):
        window = vars(cache).get("window")
        if window is not None:
            found.append(window.arrays)
        elif hasattr(cache, "keys"):
            found.append((cache.keys, cache.values))
        else:
            found.append(cache.state)
    return found


def cached_tokens(caches: Sequence[LayerCache]) -> int:
    """Return how many tokens a prompt cache has seen; recurrent parts do not say."""
    return next((cache.offset for cache in leaves(caches) if hasattr(cache, "offset")), 0)
