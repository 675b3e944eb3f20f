"""Steps that the host does not wait for: each is one function of arrays, compiled on a GPU.

The loop's ordinary step reads the loss, the count and the norm, so a GPU idles while the host
builds the next one. Here the host is a step ahead; it looks at the numbers only now and then. What
a loss has to be for that: a function of the batch's arrays, in a type that cannot overflow.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_map

from mlx_distill.arrays import SERIAL
from mlx_distill.training.gradients import clipped
from mlx_distill.training.masters import Masters, float32
from mlx_distill.training.updates import updated


class QuickSteps:
    """Steps of a training, one batch each.

    Args:
        network: Trained; its masters are what is updated.
        loss: Returns ``(sum, count)`` of a batch.
        masters: The network's.
        optimizer: Initialised with the masters.
        longest: What gradients are clipped to.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any], tuple[Any, ...]],
        masters: Masters,
        optimizer: optim.Optimizer,
        longest: float,
    ):
        self._network = network
        self._loss = loss
        self._masters = masters
        self._optimizer = optimizer
        self._longest = longest
        # On a CPU nothing is dispatched, and the compiler takes longer than many steps.
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        step = mx.compile(self._step) if on_gpu else self._step
        self._run = partial(step, next(SERIAL))
        self._before: mx.array | None = None

    def __call__(self, batch: Any) -> tuple[mx.array, mx.array, mx.array]:
        """Send a step to the device; return its loss, its count and its gradient's norm."""
        if self._before is not None:
            mx.eval(self._before)  # else graphs would pile up
        arrays, state, numbers = self._run(self._masters.arrays, self._optimizer.state, batch)
        self._optimizer.state = state
        self._masters.put(arrays)
        mx.async_eval(arrays, state, numbers)
        self._before = numbers[0]
        return numbers

    def _step(self, serial: int, arrays: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        def total(weights: Any) -> tuple[mx.array, mx.array]:
            self._network.update(weights)
            value, count, *_ = self._loss(batch)
            return value, count

        (value, count), grads = mx.value_and_grad(total)(self._masters.rounded(arrays))
        count = mx.maximum(count, 1)
        grads = tree_map(lambda gradient: gradient / count, float32(grads))
        grads, norm = clipped(grads, self._longest)
        self._optimizer.state = state
        arrays = updated(self._optimizer, grads, arrays)
        return arrays, self._optimizer.state, (value / count, count, norm)
