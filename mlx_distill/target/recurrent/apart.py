"""Mixers taken apart into convolutions, scans and the rest, which looks at one token at a time.

    before the root   a b c     tree  D - E      a convolution over 3 tokens is given
                                       `- F      b c D    c D E    c D F

Both know the ancestors of a node: a convolution is given the latest of them, and a scan, which is
a sum over all tokens before, leaves those out that are none (``gated_delta``, ``mamba2``,
``linear_attention``). So no state is made for each node, and the one before the tree is read once.
All of this happens on the device.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Protocol

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache

from mlx_distill.target.recurrent.gated_delta import gated_delta_on_tree
from mlx_distill.target.recurrent.linear_attention import linear_attention_on_tree
from mlx_distill.target.recurrent.mamba2 import mamba2_on_tree
from mlx_distill.target.recurrent.view import Arguments, Named, StatesView, replaced
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.watching import Call, Heard, during, hearing

StateAt = Callable[[int], mx.array]


@dataclass(frozen=True)
class Scan:
    """A function of mlx-lm that reads tokens into a state and returns outputs and state.

    Args:
        name: Under which models import it.
        state: Which argument is the state.
        rows: Which arguments have a row per token.
        axis: Along which axis of those.
        on_tree: Returns the outputs at the nodes of a tree, given the layout and the arguments; and
            a function that returns the state at one of the nodes.
    """

    name: str
    state: str
    rows: tuple[str, ...]
    axis: int
    on_tree: Callable[..., tuple[mx.array, StateAt]]


SCANS = {
    scan.name: scan
    for scan in (
        Scan("gated_delta_update", "state", ("q", "k", "v", "a", "b"), 1, gated_delta_on_tree),
        Scan("ssm_update", "state", ("hidden_states", "B", "C", "dt"), 1, mamba2_on_tree),
        Scan("recurrent_gla", "h", ("q", "k", "v"), 2, linear_attention_on_tree),
    )
}


class Step(Protocol):
    """What made one of a mixer's states."""

    def after(self, path: list[int]) -> mx.array:
        """Return the state after a path of nodes."""
        ...


class ApartCall:
    """A call of a mixer whose steps look along the nodes' ancestors.

    Mixers take their steps in the order in which the cache has their states.

    Args:
        view: The states.
        layout: The tree.
        convolutions: The mixer's.
    """

    def __init__(self, view: StatesView, layout: TreeLayout, convolutions: Sequence[nn.Module]):
        self.view = view
        self.layout = layout
        self.convolutions = convolutions
        self.steps: list[Step] = []

    def run(self, call: Call, args: Arguments, kwargs: Named) -> object:
        """Return what the mixer says of every node."""
        states = self.view.line if self.layout.in_line else self.view.fresh()
        args, kwargs = replaced(args, kwargs, self.view, states)
        heard = [Heard(x, functools.partial(self._convolve, x)) for x in self.convolutions]
        return during(_running, self, hearing, heard, call, *args, **kwargs)

    def _convolve(self, module: nn.Module, call: Call, x: mx.array) -> mx.array:
        """Return a convolution at every node of what lies behind its state."""
        size = x.shape[1] - self.layout.num_nodes + 1
        self.steps.append(Convolution(x, size - 1))
        if self.layout.in_line:
            return call(x)
        return call(mx.take(x.squeeze(0), self.layout.windows(size), axis=0)).swapaxes(0, 1)

    def scan(
        self, scan: Scan, own: Callable[..., tuple[mx.array, mx.array]], arguments: Named
    ) -> tuple[mx.array, mx.array | None]:
        """Return a scan's outputs at every node; a state only where the nodes are a line."""
        if self.layout.in_line:
            self.steps.append(LineScan(scan, own, arguments))
            return own(**arguments)
        outputs, state_at = scan.on_tree(self.layout, **arguments)
        self.steps.append(TreeScan(state_at))
        return outputs, None

    def replay(self, paths: Sequence[Sequence[int]], states: ArraysCache) -> None:
        """Let the states be those after a path of nodes."""
        (path,) = paths
        states.cache = [step.after(list(path)) for step in self.steps]


@dataclass(frozen=True)
class Convolution:
    """A convolution that was given the tokens of its state and the nodes.

    Args:
        given: What it was given.
        kept: How many tokens its state has.
    """

    given: mx.array
    kept: int

    def after(self, path: list[int]) -> mx.array:
        """Return the latest tokens at the end of a path."""
        line = [*range(self.kept), *(self.kept + node for node in path)]
        return mx.contiguous(_picked(self.given, line[len(path) :], 1))


@dataclass(frozen=True)
class TreeScan:
    """A scan over the nodes of a tree.

    Args:
        state_at: Returns the state at a node.
    """

    state_at: StateAt

    def after(self, path: list[int]) -> mx.array:
        """Return the state at the end of a path."""
        return self.state_at(path[-1])


@dataclass(frozen=True)
class LineScan:
    """A scan over nodes in a line.

    Args:
        scan: Which one.
        own: mlx-lm's function.
        arguments: What it was given.
    """

    scan: Scan
    own: Callable[..., tuple[mx.array, mx.array]]
    arguments: Named

    def after(self, path: list[int]) -> mx.array:
        """Return the state at the end of a path."""
        axis, given = self.scan.axis, dict(self.arguments)
        for name in self.scan.rows:
            x = given[name]
            assert isinstance(x, mx.array)
            given[name] = _picked(x, path, axis)
        return self.own(**given)[1]


def _picked(x: mx.array, places: list[int], axis: int) -> mx.array:
    """Return places along an axis; of places side by side, a view."""
    first, last = places[0], places[-1]
    if places == list(range(first, last + 1)):
        return x[(*[slice(None)] * axis, slice(first, last + 1))]
    return mx.take(x, mx.array(places), axis=axis)


_running: ContextVar[ApartCall | None] = ContextVar("_running", default=None)


def named_scans(kind: type) -> list[Scan]:
    """Return the scans that the methods of a class call."""
    called = {name for method in _methods(kind).values() for name in method.__code__.co_names}
    return [scan for name, scan in SCANS.items() if name in called]


def scanning(kind: type) -> type:
    """Return a class whose scans ask which call they belong to.

    Its methods are those of ``kind``, with other functions under the scans' names: neither the
    class nor its module changes.
    """
    rebound = {}
    for name, method in _methods(kind).items():
        own = method.__globals__
        scans = {n: _asking(SCANS[n], own[n]) for n in method.__code__.co_names if n in SCANS}
        if scans:
            changed = FunctionType(
                method.__code__,
                {**own, **scans},
                name,
                method.__defaults__,
                method.__closure__,
            )
            changed.__kwdefaults__ = method.__kwdefaults__
            rebound[name] = functools.wraps(method)(changed)
    return type(kind.__name__, (kind,), rebound)


def _methods(kind: type) -> dict[str, FunctionType]:
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    return {name: x for name, x in found.items() if isinstance(x, FunctionType)}


def _asking(scan: Scan, own: Callable[..., tuple[mx.array, mx.array]]) -> Call:
    """Return a scan that lets the running call of a mixer do it, if there is one."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def ask(*args: object, **kwargs: object) -> object:
        running = _running.get()
        if running is None:
            return own(*args, **kwargs)
        return running.scan(scan, own, signature.bind(*args, **kwargs).arguments)

    return ask
