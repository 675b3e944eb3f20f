"""What scans share: how much is left of what the tokens before have added to a state."""

import mlx.core as mx


@mx.compile
def between(mask: mx.array, here: mx.array, above: mx.array) -> mx.array:
    """Return what is left, at each node, of what was added at each of its ancestors.

    Args:
        mask: Which nodes those are.
        here: The logarithm of how much a state has faded up to each node.
        above: The same, along the axis of the ancestors.
    """
    return mx.exp(mx.where(mask, here - above, -mx.inf))
