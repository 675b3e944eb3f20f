"""Putting caches back to what they held before further tokens were read.

A cache that appends forgets by its offset alone, unless it has dropped its front since, as a cache
of chunks does when it is read. Windows, recurrent states and whatever else a model keeps are
remembered as they were: arrays are never copied for that, since nothing that a model computes
changes them.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import (
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.window import InTreeLayout, own_class

# Keys or values of a layer's cache; quantised ones are packed, with scales and perhaps biases.
Rows: TypeAlias = mx.array | tuple[mx.array, ...] | list[mx.array]

APPENDING = (KVCache, QuantizedKVCache, ChunkedKVCache)


class Chunk(NamedTuple):
    """The state of a cache of chunks.

    Args:
        offset: How many tokens it has seen.
        start_position: How many of them it has dropped.
        keys: Of the others, and room; None as long as it is empty.
        values: The same.
    """

    offset: int
    start_position: int
    keys: object
    values: object


class RestorePoint:
    """The state of a prompt cache, to which it can be put back after further tokens were read.

    Args:
        caches: The prompt cache, one entry per layer.
    """

    def __init__(self, caches: Sequence[LayerCache]):
        self.states = [state_of(cache) for cache in caches]

    def restore(self, caches: Sequence[LayerCache]) -> None:
        """Put the caches back; entries that were quantised since stay quantised."""
        for cache, state in zip(caches, self.states, strict=True):
            restore(cache, state)


def state_of(cache: LayerCache) -> object:
    """Return what ``restore`` needs."""
    if isinstance(cache, CacheList):
        return [state_of(part) for part in cache.caches]
    if isinstance(cache, ChunkedKVCache):
        arrays = _held(cache.keys), _held(cache.values)
        return Chunk(cache.offset, cache.start_position, *arrays)
    if isinstance(cache, APPENDING):  # the rows before its offset never change
        return cache.offset
    if isinstance(cache, RotatingKVCache):
        return _held(cache.state)
    return {name: _held(value) for name, value in vars(cache).items()}


def restore(cache: LayerCache, state: object) -> None:
    """Put a cache back to a state that it had."""
    if isinstance(cache, CacheList):
        assert isinstance(state, list)
        for part, one in zip(cache.caches, state, strict=True):
            restore(part, one)
    elif isinstance(cache, ChunkedKVCache):
        assert isinstance(state, Chunk)
        if cache.start_position != state.start_position:
            cache.start_position = state.start_position
            cache.keys, cache.values = _held(state.keys), _held(state.values)
        cache.offset = state.offset
    elif isinstance(cache, APPENDING):
        cache.offset = state
    elif isinstance(cache, RotatingKVCache):
        cache.state = _held(state)
    else:
        assert isinstance(state, dict)
        vars(cache).update({name: _held(value) for name, value in state.items()})


def state_at(cache: LayerCache, offset: int) -> object:
    """Return the state of a cache that appends when it held so many tokens, a few less than now."""
    if isinstance(cache, CacheList):
        return [state_at(part, offset) for part in cache.caches]
    state = state_of(cache)
    return state._replace(offset=offset) if isinstance(state, Chunk) else offset


def before_next_chunk(cache: LayerCache, start: int, end: int) -> object | None:
    """Return the state of a cache of chunks whose latest tokens lie in two of them, else None.

    The call that follows may drop of the first chunk what is needed if some tokens are taken back.

    Args:
        cache: Any.
        start: Where they begin.
        end: Where they end, which is the cache's end.
    """
    crosses = (
        isinstance(cache, ChunkedKVCache) and start // cache.chunk_size < end // cache.chunk_size
    )
    return state_of(cache) if crosses else None


def even_out(cache: LayerCache) -> None:
    """Give keys and values one length, where an interrupt has let only one of them grow.

    And a window the class that it had.
    """
    if isinstance(cache, CacheList):
        for part in cache.caches:
            even_out(part)
    elif isinstance(cache, RotatingKVCache):
        own_class(cache)
    elif isinstance(cache, APPENDING) and cache.keys is not None:
        held = cache.offset - getattr(cache, "start_position", 0)
        if held == 0:
            cache.keys = cache.values = None
        elif _length(cache.keys) != _length(cache.values):
            rows = slice(held)
            arrays = [x for x in (cache.keys, cache.values) if x is not None]
            cache.keys, cache.values = (_cut(x, rows) for x in arrays)


def can_restore(cache: LayerCache) -> bool:
    """Return whether a cache can be put back: whether all that it keeps is arrays and numbers."""
    if isinstance(cache, CacheList):
        return all(can_restore(part) for part in cache.caches)
    if type(cache) is InTreeLayout:
        return True
    return all(_is_plain(value) for value in vars(cache).values())


def _held(value: object) -> object:
    """Return a value with other names for its arrays: a row that is written changes one name."""
    if isinstance(value, mx.array):
        return value[...]
    return type(value)(map(_held, value)) if isinstance(value, list | tuple) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, mx.array | int | float | str)


def _length(x: Rows | None) -> int:
    parts = x if isinstance(x, tuple | list) else [x]
    return min(0 if part is None else part.shape[-2] for part in parts)


def _cut(x: Rows, rows: slice) -> Rows:
    if isinstance(x, mx.array):
        return x[..., rows, :]
    return tuple(part[..., rows, :] for part in x)
