"""The parts of a cycle, marked where they happen, for whoever watches.

    with phase("target", tree) as made:
        call = target.verify(tree, caches)
        made(call.logits, call.hidden)

As a rule nobody does, and a mark takes some hundred nanoseconds. A watcher is told when a part
begins and what arrays it made; these are not computed yet, so a clock has to wait for them:

    draft    the drafter's search                walk     the draws, and the path along them
    tree     what of the draft is verified       commit   the path into the caches
    target   the call of the target              read     the host fetches what was accepted

What lies between them is the host's: noise, bookkeeping, text, and the caller.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

from mlx_distill.target.layer_cache import arrays_of

PHASES = ("draft", "tree", "target", "walk", "commit")
Made = Callable[..., None]


@runtime_checkable
class Watcher(Protocol):
    """Is told of the parts of cycles."""

    def phase(self, name: str, needs: tuple[object, ...]) -> AbstractContextManager[Made]:
        """Return the context of a part, which is told what the part made.

        Args:
            name: Of the part.
            needs: What has to be there before it begins.
        """
        ...


def phase(name: str, *needs: object) -> AbstractContextManager[Made]:
    """Return the context of a part of a cycle; it takes what the part made."""
    watcher = _watcher.get()
    return _unseen if watcher is None else watcher.phase(name, needs)


def is_watched() -> bool:
    """Return whether anybody is told of the parts of cycles, in this thread."""
    return _watcher.get() is not None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of all parts of cycles meanwhile, in this thread."""
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


def _forget(*made: object) -> None:
    """Take what a part made, when nobody watches."""


_unseen = nullcontext(_forget)
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def arrays_in(thing: object) -> list[mx.array]:
    """Return the arrays in drafts, trees, caches and lists of them."""
    if isinstance(thing, mx.array):
        return [thing]
    if thing is None or isinstance(thing, str | int | float):
        return []
    if isinstance(thing, list | tuple):
        return [array for one in thing for array in arrays_in(one)]
    if is_dataclass(thing):
        return arrays_in([getattr(thing, field.name) for field in fields(thing)])
    return arrays_in(arrays_of([thing]))


@dataclass(frozen=True)
class Slice:
    """One part of one cycle, on the host's clock.

    Args:
        name: Of the part.
        start_s: When it began.
        built_s: When the host had built it.
        end_s: When it was computed; when it was built, if nobody waits for it.
    """

    name: str
    start_s: float
    built_s: float
    end_s: float


class PhaseClock:
    """Times the parts of cycles.

    Args:
        waits: Whether the device is waited for before and after each, so that nothing overlaps and
            each takes what it takes alone. Else only the host's own time is seen.

    Attributes:
        slices: What was timed, in order.
    """

    def __init__(self, waits: bool):
        self.waits = waits
        self.slices: list[Slice] = []

    @contextmanager
    def phase(self, name: str, needs: tuple[object, ...]) -> Iterator[Made]:
        """Time a part."""
        made: list[object] = []
        if self.waits:
            mx.eval(arrays_in(needs))
        start = time.perf_counter()
        yield lambda *things: made.extend(things)
        built = time.perf_counter()
        if self.waits:
            mx.eval(arrays_in(made))
        self.slices.append(Slice(name, start, built, time.perf_counter()))
