"""What every layer does with arrays: leaving the device, sizes, and logits as log-probabilities."""

import itertools
import math
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float
from mlx import nn
from mlx.utils import tree_flatten

# MLX knows a compiled function by its address and forgets a freed one in the thread alone that
# called it last (mlx 0.32, compile.cpp): in another thread, the next function at that address would
# be given the old one's graph. A number that no other function has, as an argument, prevents that.
SERIAL = itertools.count()

WIDE = 4096  # entries; the sum of fewer is as exact as float32 needs


def log_probs(logits: Float[mx.array, "... V"]) -> Float[mx.array, "... V"]:
    """Return the normalised log-probabilities, in float32."""
    logits = logits.astype(mx.float32)
    return logits - log_sum_exp(logits)


def softmax(logits: Float[mx.array, "... V"]) -> Float[mx.array, "... V"]:
    """Return the probabilities, in float32, with one exponential each; a row's sum is one."""
    probs = mx.softmax(logits.astype(mx.float32), axis=-1)
    return probs if probs.shape[-1] <= WIDE else probs / row_sum(probs)[..., None]


def log_sum_exp(x: Float[mx.array, "... V"]) -> Float[mx.array, "... 1"]:
    """Return the logarithm of the sum of a row's exponentials; -inf adds nothing."""
    if x.shape[-1] <= WIDE:
        return mx.logsumexp(x, axis=-1, keepdims=True)
    top = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    top = mx.where(top > -mx.inf, top, 0)
    return mx.log(row_sum(mx.exp(x - top)))[..., None] + top


def row_sum(x: Float[mx.array, "... V"]) -> Float[mx.array, "..."]:
    """Return the sum of each row, of a wide one as a sum of sums.

    On a CPU MLX adds a row's numbers one after the other: of 128,256 small ones the sum is off by
    2e-4 of itself, and with it every probability. In parts of some hundred it is off by 3e-7.
    """
    width = x.shape[-1]
    if width <= WIDE:
        return x.sum(axis=-1)
    part = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return x.reshape(*x.shape[:-1], -1, part).sum(axis=-1).sum(axis=-1)


def divisor(number: mx.array) -> mx.array:
    """Return what a sum is divided by for a mean: its weights' sum, or one where that is nothing.

    Weights may be shares, and their sum less than one.
    """
    return mx.where(number > 0, number, 1)


def to_host(array: mx.array) -> list[Any]:
    """Return an array's values as nested lists; this waits until they are computed."""
    values = array.tolist()
    assert isinstance(values, list)
    return values


def in_memory(array: mx.array) -> np.ndarray:
    """Return an array as it lies in memory, when it is computed; numpy has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def to_number(array: mx.array) -> int | float:
    """Return the value of an array that holds one; this waits until it is computed."""
    value = array.item()
    assert isinstance(value, int | float)
    return value


def all_finite(*arrays: mx.array) -> bool:
    """Return whether no value is infinite or NaN; this waits until all are computed."""
    return bool(to_number(mx.stack([mx.isfinite(array).all() for array in arrays]).all()))


def num_bytes(tree: Any) -> int:
    """Return the size of all arrays of a tree, such as a model's parameters."""
    leaves = (leaf for _, leaf in tree_flatten(tree))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, mx.array))


def num_values(tree: Any) -> int:
    """Return the number of values in all arrays of a tree."""
    leaves = (leaf for _, leaf in tree_flatten(tree))
    return sum(leaf.size for leaf in leaves if isinstance(leaf, mx.array))


def num_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, as many as before it was quantised."""
    count = num_values(model.parameters())
    for module in model.modules():
        if "scales" in module and "bits" in vars(module):
            packed, bits = module["weight"].size, module.bits
            added = num_values([module["scales"], module.get("biases")])
            count += packed * 32 // bits - packed - added
    return count


def by_columns(matrix: Float[mx.array, "I O"]) -> Float[mx.array, "I O"]:
    """Return a matrix that lies in memory as the weights of a linear layer do, transposed.

    A few rows are multiplied with it faster: every number of a product is read from one place.
    """
    return mx.contiguous(matrix.T).T
