"""Kernels in a graph that is counted where no GPU is: a twin's operations count as the kernel's.

Between two marks stands what the twin does, which computes the values; the marks count instead,
one for each dispatch of the kernel:

    arrays -> [begin] -> twin's operations -> [end] -> results        begin -> dispatch -> dispatch
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distill.arrays import in_memory
from mlx_distill.kernels.choice import Operation
from mlx_distill.kernels.program import Launch, Program, launching

# What stands for a dispatch: models accumulate nothing like that.
STAND_IN = "CumLogAddExp"
# Marks of other lengths are never taken for the same by a compiled function.
_lengths = itertools.count(1)


class Node(NamedTuple):
    """One operation of a graph."""

    primitive: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What it is counted as."""
        if self.primitive.startswith("Compiled"):
            return "compiled"
        return "fast" if self.primitive == STAND_IN else self.primitive


def standing_in(operation: Operation[..., Any], *args: Any, **options: Any) -> Any:
    """Return what an operation's twin returns, marked as the dispatches of its kernel."""
    dispatches, results = _dispatches(operation, *args, **options)

    def twin(*args: Any, **options: Any) -> Any:
        # What the twin would copy first, the kernel reads as it lies.
        args, options = _replaced((args, options), mx.contiguous)
        found = operation.twin(*args, **options)
        return _lying_as(results, found) if isinstance(found, mx.array) else found

    return marked_as(dispatches, twin, *args, **options)


def marked_as(dispatches: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a call returns, whose operations count as so many dispatches."""
    begin = mx.logcumsumexp(mx.broadcast_to(mx.array(0.0), (next(_lengths),)), axis=-1)
    end = begin
    for _ in range(dispatches):
        end = mx.logcumsumexp(end, axis=-1)
    args, options = _marked((list(args), options), begin)
    return _marked(call(*args, **options), end)


def _dispatches(operation: Operation[..., Any], *args: Any, **options: Any) -> tuple[int, Any]:
    """Return how many programs an operation's kernel launches, and results that mean nothing."""
    launched = []

    def launch(program: Program, what: Launch) -> list[mx.array]:
        launched.append(program.name)
        sizes = zip(what.output_shapes, what.output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in sizes]

    with launching(launch):
        results = operation.kernel(*args, **options)
    return len(launched), results


def _lying_as(made: mx.array, found: mx.array) -> mx.array:
    """Return an array whose axes lie in memory in the order that a kernel's result has.

    What reads it then copies it where it would copy the kernel's, and nowhere else.
    """
    order = np.argsort(in_memory(made).strides, kind="stable")[::-1].tolist()
    return mx.contiguous(found.transpose(order)).transpose(np.argsort(order).tolist())


def _marked(tree: Any, mark: mx.array) -> Any:
    """Return the same, whose arrays need the mark, too."""
    found: list[mx.array] = []
    _replaced(tree, lambda x: found.append(x) or x)
    marked = iter(mx.depends(found, [mark]))
    return _replaced(tree, lambda x: next(marked))


def _replaced(tree: Any, replace: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(tree, mx.array):
        return replace(tree)
    if isinstance(tree, dict):
        return {name: _replaced(value, replace) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_replaced(value, replace) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_replaced(value, replace) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: _replaced(getattr(tree, f.name), replace) for f in fields(tree)}
        return type(tree)(**values)
    return tree


def within_kernels(nodes: Iterable[Node]) -> set[Node]:
    """Return the operations between the marks of kernels, and the marks at their beginning."""
    sources = {output: node for node in nodes for output in node.outputs}
    readers = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            readers[name].append(node)

    def follows(node: Node, primitive: str) -> list[Node]:
        return [x for name in node.outputs for x in readers[name] if x.primitive == primitive]

    def above(node: Node) -> list[Node]:
        return [sources[name] for name in node.inputs if name in sources]

    within: set[Node] = set()
    for begin in nodes:
        marked = begin.primitive == STAND_IN and follows(begin, STAND_IN)
        if not marked or any(node.primitive == STAND_IN for node in above(begin)):
            continue
        end, marks = begin, set()
        while later := follows(end, STAND_IN):
            end = later[0]
            marks.add(end)
        results = follows(end, "Depends")
        needed = _reached(results, above) - set(results) - marks
        given = [source for node in follows(begin, "Depends") for source in above(node)]
        within |= {begin, *(needed - _reached(given, above))}
    return within


def _reached(start: list[Node], step: Callable[[Node], list[Node]]) -> set[Node]:
    found, waiting = set(start), list(start)
    while waiting:
        new = [x for x in step(waiting.pop()) if x not in found]
        found.update(new)
        waiting += new
    return found
