"""Rope modules that take one position per node of a tree.

``mx.fast.rope`` rotates consecutive positions, and takes a vector of offsets only along the batch
axis. The nodes of a tree, ``(1, H, N, D)``, are therefore rotated as a batch of N single tokens,
``(N, H, 1, D)``, each at its own offset, and turned back. That is exact, and it needs no kernel.
Where the nodes lie in memory head by head (behind a norm of the heads, as in gemma3), turning them
would copy them in every layer, so there every head of a node is a token of the batch.

The nodes of several texts' trees, ``(B, H, N, D)`` with a position each, are a batch of B x N.

Ropes that stretch with the text (dynamic NTK) compute with the offset as a number. They rotate
all nodes once per depth of the tree, at that depth's position, and each node takes its own.

Off the GPU a rope is a dozen small operations, repeated for the queries and keys of every layer.
But it is linear, so there each node's rotation is written out as a matrix once per call, and all
layers with the same rope multiply by it: 12 instead of 53 microseconds for 8 nodes of 6 x 64.
"""

import functools
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

import mlx.core as mx
import numpy as np
from jaxtyping import Float
from mlx import nn

from mlx_distill.arrays import in_memory, to_host
from mlx_distill.kernels.choice import chosen
from mlx_distill.kernels.tree_rope import tree_rope
from mlx_distill.untyped import Called


@dataclass(frozen=True)
class TreeSpan:
    """The tree that is being verified, as its ropes need to know it.

    Args:
        start: Position of the root.
        depth: No node is deeper than this.
        batched: Whether there are several texts: a vector of positions is then one per text.
        exact: Whether a node is rotated as in a step of plain decoding, to the last bit.
        rotations: The nodes' rotation matrices by kind of rope, or their positions by number of
            heads; filled during the call.
    """

    start: int
    depth: int
    batched: bool = False
    exact: bool = False
    rotations: dict[object, mx.array] = field(default_factory=dict)


tree_span: ContextVar[TreeSpan | None] = ContextVar("tree_span", default=None)


class Turning(NamedTuple):
    """How nodes are rotated, as the kernels are told.

    Args:
        table: Cosine and sine of every node's pairs.
        dims: The first so many values of a head are rotated.
        by_two: Whether neighbours are a pair, and not the values of two halves.
    """

    table: Float[mx.array, "N D"]
    dims: int
    by_two: bool


def _span() -> TreeSpan:
    """Return where the tree lies that is verified."""
    span = tree_span.get()
    assert span is not None
    return span


def turning_of(rope: nn.Module, positions: mx.array, width: int) -> Turning | None:
    """Return how a rope rotates the nodes of the tree that is verified, if it can be told."""
    if not isinstance(rope, _TreeRope) or not rope.takes_vectors:
        return None
    try:
        return rope.turning(positions, width)
    except ValueError:  # the rope asks whether the offset is above a limit
        return None


def wrap_ropes(model: nn.Module) -> None:
    """Teach every rope module of a model to take the positions of a tree's nodes.

    The modules stay where they are, with their parameters and their type; calls with an integer
    offset, or with a batch of offsets, do what they did.
    """
    for _, module in model.named_modules():
        if _is_rope(module) and not isinstance(module, _TreeRope):
            module.__class__ = _taught(type(module))


@functools.cache
def _taught(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a rope's class that takes trees; one for all of a kind, which is looked up faster."""
    return type(kind.__name__, (_TreeRope, kind), {})


def _is_rope(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rope" in name or "rotary" in name


class _TreeRope(Called):
    """Mixed in before a rope class."""

    takes_vectors = True

    def __call__(self, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        if tree_span.get() is None:  # a call of every token, of which there are thousands
            return super().__call__(x, *args, **kwargs)
        offset = kwargs.get("offset", args[0] if args else 0)
        call = super().__call__
        if _is_batch(offset, x):
            return self._rotate_batch(x, offset, len(args) + len(kwargs) == 1)
        if not _is_tree(offset, x):
            return call(x, *args, **kwargs)
        if self.takes_vectors:
            try:
                alone = len(args) + len(kwargs) == 1
                if alone and not _span().exact and chosen(tree_rope.name):
                    found = self.turning(offset, x.shape[-1])
                    if found is not None:
                        return tree_rope(x, *found)
                by_head = self._lie_by_head(x)
                if alone and _on_cpu() and not _span().exact:
                    nodes = self._multiply(x[0].transpose(1, 0, 2), offset)
                    return nodes.transpose(1, 0, 2)[None]
                if by_head and alone:
                    rows = x.reshape(-1, 1, 1, x.shape[-1])
                    return call(rows, offset=_for_heads(offset, x.shape[1])).reshape(x.shape)
                nodes = x.transpose(2, 1, 0, 3)
                return call(nodes, *args, **kwargs).transpose(2, 1, 0, 3)
            except ValueError:  # the rope asks whether the offset is above a limit
                self.takes_vectors = False
        nodes = x.transpose(2, 1, 0, 3)
        span = _span()
        rotated = call(nodes, offset=span.start)
        for position in range(span.start + 1, span.start + span.depth + 1):
            here = (offset == position)[:, None, None, None]
            rotated = mx.where(here, call(nodes, offset=position), rotated)
        return rotated.transpose(2, 1, 0, 3)

    def turning(self, positions: mx.array, width: int) -> Turning | None:
        """Return how nodes are rotated; None if this rope does something else."""
        pairs = self._pairs(width)
        return None if pairs is None else Turning(self._table(positions, width, *pairs), *pairs)

    def _pairs(self, width: int) -> tuple[int, bool] | None:
        """Return how many values this rope rotates, and whether neighbours are a pair.

        None if it does something else; it is tried once, which waits for the result.
        """
        known = self.__dict__.setdefault("_known_pairs", {})
        if width not in known:
            call = super().__call__
            dims = getattr(self, "dims", width)
            probe, far = (
                mx.sin(mx.arange(width, dtype=mx.float32))[None, None, None],
                mx.array([99]),
            )
            expected = call(probe, offset=far)
            known[width] = None
            for by_two in (False, True):
                table = call(_firsts(1, width, dims, by_two), offset=far)[:, 0, 0]
                found = tree_rope.twin(probe, table, dims, by_two)
                if mx.allclose(found, expected, rtol=0, atol=1e-5).item():
                    known[width] = dims, by_two
        return known[width]

    def _table(
        self, positions: mx.array, width: int, dims: int, by_two: bool
    ) -> Float[mx.array, "N D"]:
        """Return the cosine and sine of the nodes' pairs, which ropes of one kind share."""
        call = super().__call__
        tables, kind = _span().rotations, ("table", self._kind(width), dims, by_two)
        if kind not in tables:
            firsts = _firsts(positions.size, width, dims, by_two)
            tables[kind] = call(firsts, offset=positions)[:, 0, 0]
        return tables[kind]

    def _kind(self, width: int) -> int:
        """Return a number that ropes share which turn the same vector the same way, far out."""
        kinds = self.__dict__.setdefault("_kinds", {})
        if width not in kinds:
            call = super().__call__
            probe = mx.sin(mx.arange(width, dtype=mx.float32))[None, None, None]
            kinds[width] = hash((width, *to_host(call(probe, offset=1000).reshape(-1))))
        return kinds[width]

    def _lie_by_head(self, x: Float[mx.array, "1 H N D"]) -> bool:
        """Return whether nodes of so many heads lie head by head; the first ones are looked at.

        That waits for them, when the model is opened: a small tree is tried then.
        """
        known = self.__dict__.setdefault("_by_head", {})
        heads = x.shape[1]
        if heads not in known:
            known[heads] = heads > 1 and in_memory(x).flags.c_contiguous
        return known[heads]

    def _rotate_batch(
        self, x: Float[mx.array, "B H N D"], offset: mx.array, alone: bool
    ) -> Float[mx.array, "B H N D"]:
        """Rotate the nodes of several texts; ``alone`` says that the rope takes nothing else.

        Raises:
            ValueError: If this rope takes no vector of positions.
        """
        if not alone:
            raise ValueError("a rope with further arguments takes no trees of several texts")
        tokens, positions = x.swapaxes(1, 2), offset.reshape(-1)
        if _on_cpu():
            rotated = self._multiply(tokens.flatten(0, 1), positions)
        else:
            call = super().__call__
            rotated = call(tokens.reshape(-1, x.shape[1], 1, x.shape[3]), offset=positions)
        return rotated.reshape(tokens.shape).swapaxes(1, 2)

    def _multiply(
        self, nodes: Float[mx.array, "N H D"], positions: mx.array
    ) -> Float[mx.array, "N H D"]:
        """Rotate the nodes by matrices, which ropes of one kind share."""
        call = super().__call__
        width = nodes.shape[-1]
        rotations = _span().rotations
        kind = self._kind(width)
        if kind not in rotations:
            basis = mx.broadcast_to(mx.eye(width)[:, None], (positions.size, width, 1, width))
            rotations[kind] = call(basis, offset=positions)[:, :, 0]
        # In float32, as a rope computes: sines in half precision would be off by 2e-3 each.
        return (nodes.astype(mx.float32) @ rotations[kind]).astype(nodes.dtype)


def _firsts(nodes: int, width: int, dims: int, by_two: bool) -> Float[mx.array, "N 1 1 D"]:
    """Return vectors with a one where a pair's first value lies."""
    places = np.arange(width)
    first = (places < dims) & (places % 2 == 0) if by_two else places < dims // 2
    return mx.broadcast_to(mx.array(first.astype(np.float32)), (nodes, 1, 1, width))


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _for_heads(positions: mx.array, heads: int) -> mx.array:
    """Return the positions of all heads' nodes, which the layers share."""
    rotations = _span().rotations
    if heads not in rotations:
        rotations[heads] = mx.tile(positions, heads)
    return rotations[heads]


def _is_batch(offset: object, x: mx.array) -> TypeGuard[mx.array]:
    """Return whether x holds the nodes of several texts, and offset their positions."""
    if not isinstance(offset, mx.array) or not offset.ndim:
        return False
    if offset.ndim == 2:
        return offset.shape == (x.shape[0], x.shape[-2])
    # Off the GPU, single tokens are rotated by matrices, too.
    one_each = offset.size == x.shape[0] and x.shape[-2] == 1 and _on_cpu()
    span = tree_span.get()
    return one_each and span is not None and span.batched


def _is_tree(offset: object, x: mx.array) -> TypeGuard[mx.array]:
    """Return whether x holds the nodes of a tree along its sequence, and offset their positions."""
    return (
        isinstance(offset, mx.array)
        and offset.ndim == 1
        and x.shape[0] == 1
        and x.shape[-2] == offset.size > 1
    )
