"""Types and axes of every call into the package, checked while the tests run.

jaxtyping's import hook checks each call with two copies of the function's signature and binds the
arguments of both. Here beartype checks the function itself, once, and a scope for the names of axes
is opened only where an annotation has axes. And an array of an annotation's type, with sizes that
agree, is found to be one without the copies that jaxtyping keeps of a scope in case it is none: the
same mistakes are found in a sixth of the time.

A function's first calls in a test are checked, which are nearly all of its kinds of calls: a
planner is asked fifty thousand times in some.
"""

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping._storage import _has_shape_memo as _is_in_a_scope
from jaxtyping._storage import get_shape_memo, pop_shape_memo, push_shape_memo

Axis = str | int | None

_jaxtyped = jaxtyping.jaxtyped
_made: set[CodeType] = set()  # of functions in functions
CALLS = 64  # of a function in a test, that are checked
_calls: Counter[Callable[..., Any]] = Counter()


def begin() -> None:
    """Check every function's calls again: a test begins."""
    _calls.clear()
    while _is_in_a_scope():  # an interrupt has left it open
        pop_shape_memo()


def install(package: str) -> None:
    """Check every call into a package that has not been imported yet."""
    jaxtyping.jaxtyped = _decorator  # what the hook puts before every function, by this name
    _look_at_arrays_first()
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _decorator(**options: Any) -> Callable[[Any], Any]:
    whole = _jaxtyped(**options)

    def decorated(thing: Any) -> Any:
        if inspect.isclass(thing):
            return _checked_as_it_is_made(thing)
        return checked(thing) if _can_be_checked(thing) else whole(thing)

    return decorated


def _checked_as_it_is_made(kind: type) -> type:
    """Check the fields that a dataclass is given; of other classes, each method is checked."""
    if dataclasses.is_dataclass(kind) and "__init__" in vars(kind):
        kind.__init__ = _checked(kind.__init__)
    return kind


def _can_be_checked(thing: Any) -> bool:
    """Return whether beartype does: a generator runs later, when a scope of its call is closed."""
    axes = inspect.isfunction(thing) and any(map(_has_axes, thing.__annotations__.values()))
    return inspect.isfunction(thing) and not (inspect.isgeneratorfunction(thing) and axes)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks its calls, or one that is made in another as it is.

    Of those each line of code is checked as it is made for the first time: to write the checks down
    takes a millisecond, a training makes some at every step. So they are written down at a
    function's first call, too: of thousands no process calls most.
    """
    if "<locals>" in function.__qualname__:
        if function.__code__ in _made:
            return function
        _made.add(function.__code__)
    return _checked(function)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    typed = functools.cache(lambda: beartype(function))
    if not any(map(_has_axes, function.__annotations__.values())):

        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if _calls[function] >= CALLS:
                return function(*args, **kwargs)
            _calls[function] += 1
            return typed()(*args, **kwargs)

        return alone

    @functools.wraps(function)
    def in_a_scope(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if _calls[function] >= CALLS:
            return function(*args, **kwargs)
        _calls[function] += 1
        push_shape_memo({})
        try:
            return typed()(*args, **kwargs)
        finally:
            pop_shape_memo()

    return in_a_scope


def _has_axes(annotation: Any) -> bool:
    """Return whether an annotation may be of an array; one that is a string may be anything."""
    if isinstance(annotation, str):
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))


def _look_at_arrays_first() -> None:
    """Let arrays be compared with annotations quickly; what does not agree, as jaxtyping does."""
    kind = type(jaxtyping.AbstractArray)
    whole = kind.__instancecheck__
    # Axes by annotations and the types of numbers that these allow.
    allowed: dict[tuple[Any, Any], tuple[Axis, ...] | None] = {}

    def look(annotation: Any, thing: Any) -> bool:
        if type(thing) is not annotation.array_type:
            return whole(annotation, thing)
        kinds = annotation, thing.dtype
        if _agree(thing.shape, allowed.get(kinds)):
            return True
        found = whole(annotation, thing)
        if found:
            allowed[kinds] = _axes(annotation.dim_str)
        return found

    kind.__instancecheck__ = look


def _axes(text: str) -> tuple[Axis, ...] | None:
    """Return the name or size of every axis, or None for any; None if some mean something else."""
    words = text.split()
    if not all(word.isidentifier() or word.isdecimal() for word in words):
        return None
    return tuple(
        None if word.startswith("_") else int(word) if word.isdecimal() else word for word in words
    )


def _agree(shape: tuple[int, ...], axes: tuple[Axis, ...] | None) -> bool:
    """Return whether sizes are those of the scope's axes; then the scope knows the new ones."""
    if axes is None or len(shape) != len(axes):
        return False
    known = get_shape_memo()[0]
    new: dict[str, int] = {}
    for size, axis in zip(shape, axes):  # noqa: B905 (a hundred thousand times a second)
        if axis.__class__ is str:
            axis = known[axis] if axis in known else new.setdefault(axis, size)
        if axis != size and axis is not None:
            return False
    if new:
        known.update(new)
    return True
