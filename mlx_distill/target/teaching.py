"""Modules that are taught to call another function than the one of mlx-lm's that they name.

    def __call__(self, x):      a class of its own, under the same name, runs this very code with
        ... swiglu(...) ...     another function under that name

The modules stay where they are, with their parameters and their type.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from mlx import nn

from mlx_distill.target.watching import changing, own_call, watch

Function = Callable[..., Any]


def teach(model: nn.Module, function: Function, other: Function) -> None:
    """Let every module of a model that calls a function of mlx-lm's call another one instead."""
    with changing:
        for module in model.modules():
            kind = type(module)
            if not _calls(kind, function):
                continue
            watched = getattr(kind, "watched_class", None)
            module.__class__ = _taught(watched or kind, function, other)
            if watched is not None:
                watch(module)


def _name(function: Function) -> str:
    return getattr(function, "__name__", "")


def _calls(kind: type[nn.Module], function: Function) -> bool:
    call, name = own_call(kind), _name(function)
    if not isinstance(call, FunctionType) or name not in call.__code__.co_names:
        return False
    return call.__globals__.get(name) is function


@functools.cache
def _taught(kind: type[nn.Module], function: Function, other: Function) -> type[nn.Module]:
    call = own_call(kind)
    assert isinstance(call, FunctionType)
    names = {**call.__globals__, _name(function): other}
    own = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": own})
