"""Mixers with a row per node, which holds the node's ancestors: to the mixer, a batch of texts.

    tree  A - B - D        rows  A . .        behind a node comes anything: a text
           `- C                  A B .        does not look ahead
                                 A C .
                                 A B D

That takes a state per node, and serves whatever a mixer does. Its projections are made for N nodes
as ever, and spread to the rows. To remake the states the mixer runs once more, on the accepted
nodes alone; the projections are not made again.
"""

import functools
from collections.abc import Sequence
from typing import TypeGuard

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache

from mlx_distill.target.recurrent.view import Arguments, Named, StatesView, replaced
from mlx_distill.target.watching import Call, Heard, hearing


class RowsCall:
    """A call of a mixer with a row per node; in a line, with one row per text.

    Args:
        view: The states.
        projections: The mixer's modules that look at one token at a time.
    """

    def __init__(self, view: StatesView, projections: Sequence[nn.Module]):
        self.view = view
        self.layout = view.layout
        self.projections = projections
        self.projected: dict[int, list[mx.array]] = {id(x): [] for x in projections}

    def run(self, call: Call, args: Arguments, kwargs: Named) -> object:
        """Return what the mixer says of every node."""
        self.call, self.given = call, (args, kwargs)
        line = self.layout.in_line
        states = self.view.line if line else self.view.fresh()
        if not line:
            states.cache = [None if x is None else self._for_nodes(x) for x in states.cache]
        output = self._called(states, self._spread, self._project, self.layout.starts_of())
        return tree_map(self._collected, output)

    def replay(self, paths: Sequence[Sequence[int]], states: ArraysCache) -> None:
        """Let the states be those after paths of nodes, a row each."""
        nodes = mx.array([list(path) for path in paths])
        made = {key: iter(outputs) for key, outputs in self.projected.items()}

        def pick(x: mx.array) -> mx.array:
            return mx.take(x.flatten(0, 1), nodes, axis=0)

        def remembered(module: nn.Module, call: Call, x: mx.array) -> mx.array:
            return pick(next(made[id(module)])) if _holds(x, *nodes.shape) else call(x)

        starts = self.layout.starts_of([path[0] for path in paths])
        self._called(states, pick, remembered, starts)

    def _called(
        self, states: ArraysCache, change: Call, project: Call, starts: mx.array | int
    ) -> object:
        """Call the mixer on changed nodes, with something standing around its projections."""
        layout = self.layout
        args, kwargs = replaced(*self.given, self.view, states)
        # Along a path, positions are consecutive: where it begins says them all.
        args, kwargs = replaced(args, kwargs, layout.positions, starts)

        def changed(x: object) -> object:
            return change(x) if _holds(x, layout.num_texts, layout.num_nodes) else x

        heard = [Heard(x, functools.partial(project, x)) for x in self.projections]
        named = {name: changed(x) for name, x in kwargs.items()}
        return hearing(heard, self.call, *map(changed, args), **named)

    def _project(self, module: nn.Module, call: Call, x: mx.array) -> mx.array:
        """Return a projection of the rows, made once for every node."""
        layout = self.layout
        rows = layout.num_texts * (1 if layout.in_line else layout.num_nodes)
        if not _holds(x, rows, self._length):
            return call(x)
        output = call(self._collected(x))
        self.projected[id(module)].append(output)
        return self._spread(output)

    @property
    def _length(self) -> int:
        layout = self.layout
        return layout.num_nodes if layout.in_line else layout.max_depth + 1

    def _for_nodes(self, x: mx.array) -> mx.array:
        """Turn states of texts, (B, ...), into those of all their nodes, (B N, ...)."""
        shape = (x.shape[0], self.layout.num_nodes, *x.shape[1:])
        return mx.broadcast_to(x[:, None], shape).flatten(0, 1)

    def _spread(self, x: mx.array) -> mx.array:
        """Turn nodes, (B, N, ...), into rows of their ancestors, (B N, S, ...)."""
        return x if self.layout.in_line else mx.take(x.flatten(0, 1), self.layout.paths, axis=0)

    def _collected(self, x: mx.array) -> mx.array:
        """Turn rows into nodes."""
        layout = self.layout
        if layout.in_line:
            return x
        nodes = x[mx.arange(x.shape[0]), layout.depths.reshape(-1)]
        return nodes.reshape(layout.num_texts, layout.num_nodes, *x.shape[2:])


def _holds(x: object, rows: int, length: int) -> TypeGuard[mx.array]:
    """Return whether something is an array with states, or ids, for tokens in rows."""
    if not isinstance(x, mx.array) or x.shape[:2] != (rows, length):
        return False
    return x.ndim > 2 or mx.issubdtype(x.dtype, mx.integer)
