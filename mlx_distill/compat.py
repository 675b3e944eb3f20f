"""Every private name of mlx-lm that the package leans on, in one place.

What begins with an underscore there may go with any release; ``tests/test_compat.py`` says which
releases have it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import _get_classes, can_run_metal

Divergence: TypeAlias = Callable[[mx.array, mx.array], mx.array]


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """Return the class of a configuration's model, and that of its arguments."""
    return _get_classes(config)


def complete(network: nn.Module) -> None:
    """Give a network what its classes have left out, in place.

    Those of RecurrentGemma and Mistral 4 do not call the ``__init__`` of their base, and can be
    neither frozen nor trained without what that sets.
    """
    for module in network.modules():
        if "_no_grad" not in vars(module):
            module._no_grad = set()
            module._training = vars(module).get("_training", True)


def wired(
    model: nn.Module, streams: Sequence[mx.Stream | mx.ThreadLocalStream]
) -> AbstractContextManager[None]:
    """Return what keeps a model's weights in memory; the streams are waited for at its end."""
    return wired_limit(model, list(streams))  # pyright: ignore[reportArgumentType]


def ring_index(cache: RotatingKVCache) -> int:
    """Return where the next token of a rotating cache goes."""
    return cache._idx


RING_NAMES = ("keys", "values", "_idx")
"""The attributes of a rotating cache that hold its content and the order it is in."""


def set_ring(cache: RotatingKVCache, keys: mx.array | None, values: mx.array | None) -> None:
    """Give a rotating cache its content, in the order of the text."""
    cache.keys, cache.values = keys, values
    cache._idx = 0 if keys is None else keys.shape[2]


def divergence_kernels() -> tuple[Divergence, Divergence] | None:
    """Return mlx-lm's own kernels of the KL and the JS divergence, where they can run.

    Both take logits of a student and of a teacher. mlx-lm makes the kernels when its module is
    imported, and only if Metal is in use then.
    """
    if not can_run_metal():
        return None
    from mlx_lm.tuner import losses  # and with it all that trains, which nobody else needs

    made = losses._kl_forward_kernel is not None and losses._js_forward_kernel is not None
    return (losses.kl_div_loss, losses.js_div_loss) if made else None
