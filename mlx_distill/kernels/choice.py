"""Whether an operation is done by its kernel or by its twin: decided here and nowhere else.

``MLX_DISTILL_KERNELS`` says how: ``off`` never takes a kernel, ``probe``, the default, takes those
that were found right and faster on this machine, ``force`` takes all. Without a GPU there are none;
what calls of several rows do otherwise on a processor (``exponentials``) goes by the same word.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from mlx_distill.errors import InputError
from mlx_distill.kernels.program import has_gpu

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "MLX_DISTILL_KERNELS"
MODES = ("off", "probe", "force")


@dataclass(frozen=True)
class Case:
    """Arguments that an operation is tried with.

    Args:
        name: What is special about them, for messages.
        args: Positional arguments.
        options: Named ones.
    """

    name: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]


Cases = Callable[[int], Iterable[Case]]
"""Endless cases, random and adversarial ones mixed, made of a seed; the harness and the probe take
as many as they have time for."""

OPERATIONS: dict[str, "Operation[..., Any]"] = {}
"""All that there are, by name."""


def _once(function: Callable[..., Any], case: Case) -> Any:
    return function(*case.args, **case.options)


@dataclass(frozen=True)
class Operation(Generic[P, R]):
    """Something that a kernel does in one dispatch or two, and MLX's own operations do, too.

    Calling it does it, by whichever was chosen.

    Args:
        name: Of the operation.
        kernel: Does it by programs.
        twin: Does it by MLX's operations: the same arguments, the same results.
        cases: What both are compared on.
        differ: Says in what two results are not the same, or "" where they are within rounding.
        takes: Whether the kernel takes these arguments; the twin takes all.
        tried: What is compared of the kernel, or of the twin, in a case: what it returns, or more,
            as gradients.
    """

    name: str
    kernel: Callable[P, R]
    twin: Callable[P, R]
    cases: Cases
    differ: Callable[[Case, Any, Any], str]
    takes: Callable[P, bool] = lambda *args, **options: True
    tried: Callable[[Callable[..., Any], Case], Any] = _once

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """Return the results, of the kernel or of its twin."""
        if not chosen(self.name) or not self.takes(*args, **options):
            return self.twin(*args, **options)
        return _performers[-1](self, *args, **options)


_verdicts: dict[str, bool] = {}
_forced: list[tuple[bool, Collection[str]]] = []


def chosen(name: str) -> bool:
    """Return whether an operation's kernel is taken."""
    if _forced:
        kernels, but = _forced[-1]
        return kernels and name not in but
    how = mode()  # another word is refused without a GPU, too
    if not has_gpu():
        return False
    return how == "force" or (how == "probe" and _verdicts.get(name, False))


def trusted() -> bool:
    """Return whether kernels may be taken that others have proved, and no probe has tried."""
    return _forced[-1][0] if _forced else mode() != "off"


def mode() -> str:
    """Return how kernels are chosen.

    Raises:
        InputError: If the variable says something else.
    """
    found = os.environ.get(VARIABLE, "probe")
    if found not in MODES:
        raise InputError(f"{VARIABLE} must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {found}")
    return found


def trust(verdicts: Mapping[str, bool]) -> None:
    """Take the kernels that were found right and faster; of the others the twins."""
    _verdicts.clear()
    _verdicts.update(verdicts)


@contextmanager
def forced(kernels: bool = True, but: Collection[str] = ()) -> Iterator[None]:
    """Take all kernels meanwhile, or none, whatever was found of them, and without a GPU, too.

    Args:
        kernels: Whether to take them.
        but: Names of operations whose twins are taken all the same.
    """
    _forced.append((kernels, but))
    try:
        yield
    finally:
        _forced.pop()


Performer = Callable[..., Any]


def _perform(operation: Operation[..., Any], *args: Any, **options: Any) -> Any:
    return operation.kernel(*args, **options)


_performers: list[Performer] = [_perform]


@contextmanager
def performing(performer: Performer) -> Iterator[None]:
    """Let somebody else call the kernels that are taken meanwhile: as one who counts them."""
    _performers.append(performer)
    try:
        yield
    finally:
        _performers.pop()
