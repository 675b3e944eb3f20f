"""Trees for models whose layers cannot take one: every path is a row of a batch.

    nodes    A  B  C  D        rows    A  B  D
    parents  -  A  A  B                A  C  .

The rows are read as several texts are, by copies of the caches; what a row holds behind its path
comes later than all that is asked for. Copies cost as much as the cached text is long, and a node
is computed in every row that it lies on, so lines are given to the caches themselves.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache

from mlx_distill.arrays import to_host
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.restoring import APPENDING, before_next_chunk, restore, state_of
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.window import InTreeLayout, settle


@dataclass(frozen=True)
class PathRows:
    """The paths of a tree that are no part of another one.

    Args:
        rows: Their nodes, root first.
        places: Which row each node is looked up in, and where in it.
    """

    rows: Sequence[Sequence[int]]
    places: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, layout: TreeLayout) -> "PathRows":
        """Return the rows of a tree; reads its arrays."""
        lines, depths = to_host(layout.paths), to_host(layout.depths)
        paths = [line[: depth + 1] for line, depth in zip(lines, depths, strict=True)]
        rows: list[list[int]] = []
        for path in sorted(paths, key=len, reverse=True):
            if not any(row[: len(path)] == path for row in rows):
                rows.append(path)
        homes = (next(i for i, row in enumerate(rows) if row[: len(p)] == p) for p in paths)
        return cls(rows, [(home, len(p) - 1) for home, p in zip(homes, paths, strict=True)])

    @property
    def length(self) -> int:
        """The longest row's nodes."""
        return len(self.rows[0])

    def spread(self, tokens: Int[mx.array, " N"]) -> Int[mx.array, "L S"]:
        """Return the nodes' tokens in rows, each filled up with its last one."""
        filled = [[*row, *[row[-1]] * (self.length - len(row))] for row in self.rows]
        return tokens[mx.array(np.array(filled, dtype=np.int32))]

    def collected(self, x: mx.array) -> mx.array:
        """Return what was computed at each node, of what was at all tokens of the rows."""
        return x[mx.array([row * self.length + place for row, place in self.places])]


def copied(cache: LayerCache, rows: int) -> LayerCache:
    """Return a cache that holds in so many rows what another one holds in its only one."""
    if isinstance(cache, InTreeLayout):
        settle(cache)
    made = copy.copy(cache)
    if isinstance(cache, CacheList):
        made.caches = tuple(copied(part, rows) for part in cache.caches)
    else:
        vars(made).update({name: _repeated(x, rows) for name, x in vars(cache).items()})
    return made


def _repeated(value: object, rows: int) -> object:
    if isinstance(value, mx.array):
        return mx.broadcast_to(value, (rows, *value.shape[1:]))
    if isinstance(value, list | tuple):
        return type(value)([_repeated(x, rows) for x in value])
    return value


class CopiedCache:
    """One layer's cache while the rows are read by a copy of it.

    Args:
        base: The cache, which does not change before the commit.
        copy: What read the rows; given up with the commit.
        layout: Where the nodes lie.
        rows: The paths.
    """

    def __init__(self, base: LayerCache, copy: LayerCache, layout: TreeLayout, rows: PathRows):
        self.base = base
        self.layout = layout
        self.before = state_of(base)
        self.after: object | None = None
        self._copy, self._rows = copy, rows

    def commit(self, path: list[int]) -> bool:
        """Keep the nodes of the accepted path; return whether the cache holds them.

        Keys and values are taken from the path's row. States are those behind the row's end: the
        path is to be read again.
        """
        read, self._copy = self._copy, None
        if not isinstance(read, KVCache | ChunkedKVCache):
            return False
        held = [x for x in (read.keys, read.values) if x is not None]
        row = self._rows.places[path[-1]][0]
        begin = self.layout.start - getattr(read, "start_position", 0)
        here = slice(begin, begin + len(path))
        self.base.update_and_fetch(*(x[row : row + 1, :, here] for x in held))
        start = self.layout.start
        self.after = before_next_chunk(self.base, start, start + len(path))
        return True

    def rewind(self, num_tokens: int) -> bool:
        """Keep the first ``num_tokens`` of the path; False asks for them to be read again."""
        if isinstance(self.base, APPENDING):
            if self.after is not None:
                restore(self.base, self.after)
            self.base.offset = self.layout.start + num_tokens
            return True
        restore(self.base, self.before)
        return num_tokens == 0
