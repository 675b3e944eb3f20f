"""What is trained, in float32, beside a network that computes in a type of its own.

An update is a thousandth of a weight and less: in bfloat16, with eight bits, it is mostly lost, and
in float16 the squares of gradients are zero. So the optimizer works on float32 masters, and the
network is given them rounded. Of a network in float32 the masters are its own arrays.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten


def float32(tree: Any) -> Any:
    """Return a tree's arrays in float32, without the branches that hold none."""
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    return tree_unflatten([(name, array.astype(mx.float32)) for name, array in arrays.items()])


class Masters:
    """The masters of a network's trainable parameters.

    Args:
        network: Its types are those that the masters are rounded to.

    Attributes:
        arrays: A tree, as ``network.trainable_parameters()``.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.arrays = float32(network.trainable_parameters())
        flat: dict[str, Any] = dict(tree_flatten(network.trainable_parameters()))
        self._types = {name: array.dtype for name, array in flat.items()}

    @property
    def has_float16(self) -> bool:
        """Whether the network computes in float16, whose largest number is 65,504."""
        arrays: list[tuple[str, Any]] = [*tree_flatten(self.network.parameters())]  # pyright: ignore
        return any(array.dtype == mx.float16 for _, array in arrays)

    def put(self, arrays: Any) -> None:
        """Take new masters, and give the network what they are in its types."""
        self.arrays = arrays
        self.network.update(self.rounded(arrays))

    def rounded(self, arrays: Any) -> Any:
        """Return masters in the network's types."""
        flat: dict[str, Any] = dict(tree_flatten(arrays))
        return tree_unflatten(
            [(name, array.astype(self._types[name])) for name, array in flat.items()]
        )

    def kept(self) -> dict[str, mx.array]:
        """Return what training changes: the masters, and running means of normalisations.

        A frozen base under adapters may be a hundred times as large, and is as it was.
        """
        running = ("running_mean", "running_var")
        every: dict[str, Any] = dict(tree_flatten(self.network.parameters()))
        means = {name: array for name, array in every.items() if name.endswith(running)}
        masters: dict[str, Any] = dict(tree_flatten(self.arrays))
        return means | masters

    def restore(self, kept: dict[str, mx.array]) -> None:
        """Take up what ``kept`` returned."""
        own: dict[str, Any] = dict(tree_flatten(self.arrays))
        means = [(name, array) for name, array in kept.items() if name not in own]
        self.network.load_weights(means, strict=False)
        self.put(tree_unflatten([(name, kept[name]) for name in own]))
