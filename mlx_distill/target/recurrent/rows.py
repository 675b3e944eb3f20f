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

from mlx_distill.target.recurrent.view import Arguments, Named, RecurrentTreeCache, replaced
from mlx_distill.target.watching import Call, Heard, listening


class RowsCall:
    """A call of a mixer with a row per node; in a line, with one row.

    Args:
        view: The states.
        projections: The mixer's modules that look at one token at a time.
    """

    def __init__(self, view: RecurrentTreeCache, projections: Sequence[nn.Module]):
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
            rows = self.layout.num_nodes
            states.cache = [
                None if x is None else mx.broadcast_to(x, (rows, *x.shape[1:]))
                for x in states.cache
            ]
        output = self._called(states, self._spread, self._project)
        return tree_map(self._collected, output)

    def replay(self, path: list[int], states: ArraysCache) -> None:
        """Let the states be those after a path of nodes."""
        nodes = mx.array(path)
        made = {key: iter(outputs) for key, outputs in self.projected.items()}

        def pick(x: mx.array) -> mx.array:
            return mx.take(x, nodes, axis=1)

        def remembered(module: nn.Module, call: Call, x: mx.array) -> mx.array:
            return pick(next(made[id(module)])) if _holds(x, 1, len(path)) else call(x)

        self._called(states, pick, remembered)

    def _called(self, states: ArraysCache, change: Call, project: Call) -> object:
        """Call the mixer on changed nodes, with something standing around its projections."""
        layout = self.layout
        args, kwargs = replaced(*self.given, self.view, states)
        # Along a path, positions are consecutive: a number says them all.
        args, kwargs = replaced(args, kwargs, layout.positions, layout.start)

        def changed(x: object) -> object:
            return change(x) if _holds(x, 1, layout.num_nodes) else x

        heard = [Heard(x, functools.partial(project, x)) for x in self.projections]
        with listening(heard):
            return self.call(*map(changed, args), **{n: changed(x) for n, x in kwargs.items()})

    def _project(self, module: nn.Module, call: Call, x: mx.array) -> mx.array:
        """Return a projection of the rows, made once for every node."""
        width = 1 if self.layout.in_line else self.layout.num_nodes
        if not _holds(x, width, self._length):
            return call(x)
        output = call(self._collected(x))
        self.projected[id(module)].append(output)
        return self._spread(output)

    @property
    def _length(self) -> int:
        layout = self.layout
        return layout.num_nodes if layout.in_line else layout.max_depth + 1

    def _spread(self, x: mx.array) -> mx.array:
        """Turn nodes, (1, N, ...), into rows of their ancestors, (N, S, ...)."""
        return x if self.layout.in_line else mx.take(x.squeeze(0), self.layout.paths, axis=0)

    def _collected(self, x: mx.array) -> mx.array:
        """Turn rows into nodes."""
        if self.layout.in_line:
            return x
        return x[mx.arange(self.layout.num_nodes), self.layout.depths][None]


def _holds(x: object, rows: int, length: int) -> TypeGuard[mx.array]:
    """Return whether something is an array with states, or ids, for tokens in rows."""
    if not isinstance(x, mx.array) or x.shape[:2] != (rows, length):
        return False
    return x.ndim > 2 or mx.issubdtype(x.dtype, mx.integer)
