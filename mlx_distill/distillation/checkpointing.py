"""Layers that compute their activations again in the backward, instead of keeping them.

A layer writes its keys, values or states into a cache, and others may read them there (gemma3n).
MLX's ``checkpoint`` knows nothing of that: it runs the layer twice, and passes gradients on through
what the layer returns only. So what a cache holds goes in and comes out beside the layer's output.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import CacheList

from mlx_distill.errors import InputError
from mlx_distill.target.layers import numbered_layers

State = dict[str, Any]
"""A cache's attributes."""


def checkpoint_layers(network: nn.Module) -> None:
    """Let every layer compute its activations again in the backward, while it is in training."""
    try:
        layers = numbered_layers(network)
    except InputError:  # a network of one piece
        return
    for layer in layers:
        if not hasattr(type(layer), "checkpointed_class"):
            layer.__class__ = _checkpointed(type(layer))


@functools.cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name whose calls are checkpointed; one for all of a kind."""

    @functools.wraps(kind.__call__)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *args, **kwargs)
        parameters = self.trainable_parameters()
        caches = list(_caches([*args, *kwargs.values()]))
        states = [_arrays(cache) for cache in caches]
        others: list[State] = [_others(cache) for cache in caches]
        after = others

        def layer(parameters: Any, states: list[State], args: Any, kwargs: Any) -> Any:
            nonlocal after
            self.update(parameters)
            _set(caches, states, others)
            output = kind.__call__(self, *args, **kwargs)
            after = [_others(cache) for cache in caches]
            return output, [_arrays(cache) for cache in caches]

        output, states = mx.checkpoint(layer)(parameters, states, args, kwargs)
        self.update(parameters)
        _set(caches, states, after)
        return output

    return type(kind.__name__, (kind,), {"__call__": call, "checkpointed_class": kind})


def _caches(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, CacheList):
            yield from _caches(list(value.caches))
        elif hasattr(value, "make_mask"):
            yield value


def _arrays(cache: Any) -> State:
    return {name: value for name, value in vars(cache).items() if _holds_arrays(value)}


def _others(cache: Any) -> State:
    return {name: value for name, value in vars(cache).items() if not _holds_arrays(value)}


def _holds_arrays(value: Any) -> bool:
    """Return whether a value is an array, or a list such as that of a recurrent layer's states."""
    if isinstance(value, list | tuple):
        return any(isinstance(one, mx.array) for one in value)
    return isinstance(value, mx.array)


def _set(caches: list[Any], states: list[State], others: list[State]) -> None:
    for cache, state, other in zip(caches, states, others, strict=True):
        held = vars(cache)
        held.clear()
        # Caches write into their lists of states: each run of a layer gets a list of its own.
        held.update({name: copy.copy(value) for name, value in {**other, **state}.items()})
