"""What every layer does with arrays: leaving the device, sizes, and logits as log-probabilities."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx.utils import tree_flatten


def log_probs(logits: Float[mx.array, "... V"]) -> Float[mx.array, "... V"]:
    """Return the normalised log-probabilities, in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def to_host(array: mx.array) -> list[Any]:
    """Return an array's values as nested lists; this waits until they are computed."""
    values = array.tolist()
    assert isinstance(values, list)
    return values


def to_number(array: mx.array) -> int | float:
    """Return the value of an array that holds one; this waits until it is computed."""
    value = array.item()
    assert isinstance(value, int | float)
    return value


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
