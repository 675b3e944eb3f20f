"""Types and axes of every call into the package, checked while the tests run.

jaxtyping's import hook checks each call with two copies of the function's signature and binds the
arguments of both. Here beartype checks the function itself, once, and a scope for the names of axes
is opened only where an annotation has axes: the same mistakes are found in a third of the time.
"""

import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped
_made: set[CodeType] = set()  # of functions in functions


def install(package: str) -> None:
    """Check every call into a package that has not been imported yet."""
    jaxtyping.jaxtyped = _decorator  # what the hook puts before every function, by this name
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _decorator(**options: Any) -> Callable[[Any], Any]:
    whole = _jaxtyped(**options)
    return lambda thing: checked(thing) if _can_be_checked(thing) else whole(thing)


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
    typed = functools.cache(lambda: beartype(function))
    if not any(map(_has_axes, function.__annotations__.values())):

        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return typed()(*args, **kwargs)

        return alone

    @functools.wraps(function)
    def in_a_scope(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with _jaxtyped("context"):
            return typed()(*args, **kwargs)

    return in_a_scope


def _has_axes(annotation: Any) -> bool:
    """Return whether an annotation may be of an array; one that is a string may be anything."""
    if isinstance(annotation, str):
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))
