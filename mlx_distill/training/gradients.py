"""The gradients of a step: sums over its batches in float32, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map

from mlx_distill.arrays import divisor, to_number
from mlx_distill.training.masters import float32

SMALLEST_SCALE = 2.0**-32


class Sums:
    """What the batches of a step add up to."""

    def __init__(self) -> None:
        self.total, self.number = mx.array(0.0), mx.array(0.0)
        self.parts: dict[str, mx.array] = {}
        self.gradients: Any = None
        self.rows: list[int] = []

    def add(self, batch: Any, found: "Found") -> None:
        """Add a batch's."""
        self.rows += getattr(batch, "rows", ())
        self.total, self.number = self.total + found.total, self.number + found.count
        for name, part in found.parts.items():
            self.parts[name] = self.parts.get(name, mx.array(0.0)) + part * found.count
        if self.gradients is None:
            self.gradients = found.gradients
        else:
            self.gradients = tree_map(mx.add, self.gradients, found.gradients)
        mx.eval(self.total, self.number, self.gradients, self.parts)

    @property
    def count(self) -> float:
        """What they are divided by."""
        return float(to_number(self.number))

    def means(self) -> tuple[float, dict[str, float]]:
        """Return the loss, and the terms that it is made of."""
        number = divisor(self.number)
        parts = {name: float(to_number(part / number)) for name, part in self.parts.items()}
        return float(to_number(self.total / number)), parts

    def mean_gradients(self) -> Any:
        """Return the gradients of the loss, and forget their sums."""
        number = divisor(self.number)
        sums, self.gradients = self.gradients, None
        return tree_map(lambda gradient: gradient / number, sums)


class Found:
    """The sums of one batch; gradients in float32."""

    def __init__(self, total: mx.array, count: mx.array, parts: dict[str, mx.array], grads: Any):
        self.total, self.count, self.parts, self.gradients = total, count, parts, grads


class Gradients:
    """Makes the gradients of a loss.

    Sums over thousands of tokens may be beyond float16's largest number where they leave a layer.
    Then the loss is scaled down, by a power of two so that no bit changes elsewhere, and the batch
    is read again; later ones begin with that scale.

    Args:
        network: Its trainable parameters have gradients.
        loss: Returns ``(sum, count)`` of a batch, and perhaps the parts' means.
        has_float16: Whether gradients may overflow.

    Attributes:
        scale: What losses are multiplied by; 1 until something overflows.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[Any], tuple[Any, ...]], has_float16: bool
    ):
        self.scale = 1.0
        self._has_float16 = has_float16

        def scaled(batch: Any, scale: float) -> tuple[Any, ...]:
            total, count, *more = loss(batch)
            return total * scale, total, count, more[0] if more else {}

        self._value_and_grad = value_and_grad(network, scaled)

    def sums(self, batches: Iterable[Any]) -> Sums:
        """Return the sums over some batches."""
        sums = Sums()
        for batch in batches:
            sums.add(batch, self._of(batch))
        return sums

    def _of(self, batch: Any) -> Found:
        while True:
            (_, total, count, parts), grads = self._value_and_grad(batch, self.scale)
            grads = float32(grads)
            if self._has_float16 and self.scale > SMALLEST_SCALE:
                finite = math.isfinite(to_number(squared_norm(grads)))
                if not finite and math.isfinite(to_number(total)):
                    self.scale /= 16
                    continue
            if self.scale != 1:
                grads = tree_map(lambda gradient: gradient / self.scale, grads)
            return Found(total, count, parts, grads)


def clipped(grads: Any, longest: float) -> tuple[Any, mx.array]:
    """Return gradients that are at most so long, and how long they were."""
    norm = mx.sqrt(squared_norm(grads))
    factor = mx.minimum(longest / (norm + 1e-6), 1.0)
    return tree_map(lambda gradient: gradient * factor, grads), norm


def squared_norm(grads: Any) -> mx.array:
    """Return the sum of all squares; the last axis first, as one sum over millions is off."""
    arrays: dict[str, mx.array] = dict(tree_flatten(grads))
    rows = [array[None] if array.ndim == 0 else array for array in arrays.values()]
    return sum((mx.square(row).sum(axis=-1).sum() for row in rows), mx.array(0.0))
