"""Rope modules that take one position per node of a tree.

``mx.fast.rope`` rotates consecutive positions, and takes a vector of offsets only along the batch
axis. The nodes of a tree, ``(1, H, N, D)``, are therefore rotated as a batch of N single tokens,
``(N, H, 1, D)``, each at its own offset, and turned back. That is exact, and it needs no kernel.

Ropes that stretch with the text (dynamic NTK) compute with the offset as a number. They rotate
all nodes once per depth of the tree, at that depth's position, and each node takes its own.
"""

from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx import nn

# First position and depth of the tree that is being verified, for ropes that want numbers.
tree_span: ContextVar[tuple[int, int]] = ContextVar("tree_span")


def wrap_ropes(model: nn.Module) -> None:
    """Teach every rope module of a model to take the positions of a tree's nodes.

    The modules stay where they are, with their parameters and their type; calls with an integer
    offset, or with a batch of offsets, do what they did.
    """
    for _, module in model.named_modules():
        if _is_rope(module) and not isinstance(module, _TreeRope):
            kind = type(module)
            module.__class__ = type(kind.__name__, (_TreeRope, kind), {})


def _is_rope(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rope" in name or "rotary" in name


class _TreeRope:
    """Mixed in before a rope class."""

    takes_vectors = True

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        offset = kwargs.get("offset", args[0] if args else 0)
        call = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if not _is_tree(x, offset):
            return call(x, *args, **kwargs)
        nodes = x.transpose(2, 1, 0, 3)
        if self.takes_vectors:
            try:
                return call(nodes, *args, **kwargs).transpose(2, 1, 0, 3)
            except ValueError:  # the rope asks whether the offset is above a limit
                self.takes_vectors = False
        start, depth = tree_span.get()
        rotated = call(nodes, offset=start)
        for position in range(start + 1, start + depth + 1):
            here = (offset == position)[:, None, None, None]
            rotated = mx.where(here, call(nodes, offset=position), rotated)
        return rotated.transpose(2, 1, 0, 3)


def _is_tree(x: mx.array, offset: Any) -> bool:
    """Return whether x holds the nodes of a tree along its sequence, and offset their positions."""
    return (
        isinstance(offset, mx.array)
        and offset.ndim == 1
        and x.shape[0] == 1
        and x.shape[-2] == offset.size > 1
    )
