"""An optimizer's update, large arrays one after the other.

An update makes some arrays of a parameter's size on the way. MLX makes room for what it computes
some operations ahead, so without an order those of many parameters are there at once: of the ten
largest, two and a half each. In order they are those of one.
"""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

LARGE = 2**22  # numbers; smaller arrays are not worth waiting for


def updated(optimizer: optim.Optimizer, gradients: Any, arrays: Any) -> Any:
    """Return ``optimizer.apply_gradients(gradients, arrays)``, the same numbers.

    Args:
        optimizer: Initialised with the arrays.
        gradients: A tree.
        arrays: What they are the gradients of; a tree of the same shape.
    """
    optimizer.apply_gradients({}, {})  # the step and the learning rate
    known: dict[str, mx.array] = dict(tree_flatten(arrays))
    found: list[tuple[str, mx.array]] = []
    before: mx.array | None = None
    flat: list[tuple[str, Any]] = [*tree_flatten(gradients)]  # pyright: ignore
    for name, gradient in flat:
        if before is not None and gradient.size >= LARGE:
            gradient = mx.depends([gradient], [before])[0]
        new = optimizer.apply_single(gradient, known[name], _at(optimizer.state, name))
        before = new if gradient.size >= LARGE else before
        found.append((name, new))
    return tree_unflatten(found)


def _at(tree: Any, name: str) -> Any:
    """Return the branch of a name as ``tree_flatten`` writes it."""
    for part in name.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree
