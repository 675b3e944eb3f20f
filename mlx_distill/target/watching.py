"""Standing around the calls of modules: seeing what they are given, changing what they return.

A watched module gets a class of its own: one that asks whether anybody listens *in this thread* and
otherwise does what it did. So nothing about a model changes during a call, a thread that taps a
model is not heard by another one that calls it, and a copy of a watched model is a watched model.
Parameters and names stay as they are, and gradients flow as ever.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlx import nn

Call = Callable[..., Any]
"""A method of a module; or what stands around it, which is given the method, then its arguments."""

METHODS = ("__call__", "as_linear")


class Heard(NamedTuple):
    """What stands around one method of one module."""

    module: nn.Module
    around: Call
    method: str = "__call__"


class _Here(threading.local):
    """What stands around methods in this thread, by module and method; the outermost last."""

    def __init__(self) -> None:
        self.around: dict[tuple[int, str], list[Call]] = {}


_here = _Here()
_changing = threading.RLock()  # a class that one thread needs must not be taken back by another


class listening:  # a function to its callers; every call of a target enters it
    """Let callables stand around methods, in this thread, within; the latest outermost."""

    def __init__(self, heard: Iterable[Heard]):
        self._heard = list(heard)

    def __enter__(self) -> None:
        for one in self._heard:
            watch(one.module)
        _stand(self._heard)

    def __exit__(self, *error: object) -> None:
        _leave(self._heard)


@contextmanager
def listening_once(heard: Iterable[Heard]) -> Iterator[None]:
    """Do the same, and leave no watched module behind: for a look at all modules of a model.

    A watched call costs a third of a microsecond more, which is little for a few modules.
    """
    with _changing:
        heard = list(heard)
        kinds = [(one.module, type(one.module)) for one in heard]
        taken = [(module, kind) for module, kind in kinds if watch(module)]
        try:
            _stand(heard)
            try:
                yield
            finally:
                _leave(heard)
        finally:
            for module, kind in taken:
                module.__class__ = kind


def watch(module: nn.Module) -> bool:
    """Give a module its watched class; return whether it did not have it."""
    with _changing:
        kind = type(module)
        if hasattr(kind, "watched_class"):
            return False
        module.__class__ = _watched(kind)
        return True


def own_call(kind: type[nn.Module]) -> object:
    """Return the function that a class is called by, whoever watches; None if there is none."""
    kinds = getattr(kind, "watched_class", kind).__mro__
    return next((vars(one)["__call__"] for one in kinds if "__call__" in vars(one)), None)


def _stand(heard: Sequence[Heard]) -> None:
    for one in heard:
        _here.around.setdefault((id(one.module), one.method), []).append(one.around)


def _leave(heard: Sequence[Heard]) -> None:
    around = _here.around
    for one in reversed(heard):
        key = (id(one.module), one.method)
        around[key].pop()
        if not around[key]:
            del around[key]


@functools.cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name that asks who listens; one for all modules of a kind."""
    methods = {name: _asking(kind, name) for name in METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "watched_class": kind})


def _asking(kind: type[nn.Module], name: str) -> Call:
    method = getattr(kind, name)

    # The method is that of the class before, not of ``super``: while it runs, the module may get
    # its former class back.
    @functools.wraps(method)
    def ask(self: nn.Module, *args: object, **kwargs: object) -> object:
        around = _here.around
        if not around or (id(self), name) not in around:
            return method(self, *args, **kwargs)
        call = functools.partial(method, self)
        for outer in around[id(self), name]:
            call = functools.partial(outer, call)
        return call(*args, **kwargs)

    return ask
