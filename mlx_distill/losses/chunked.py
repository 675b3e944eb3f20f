"""Losses over a vocabulary without its logits: head, loss and gradient, some tokens at a time.

The logits of a thousand tokens over fifty thousand entries are 200 MB in float32, and a loss and
its gradient hold several arrays of that size. Here they exist for one chunk of tokens only: the
gradient is computed with the loss, in the forward, and what is kept of it has the size of the
hidden states and, in float32, of what is trained of the head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

CHUNK_ROWS = 256  # with fewer, a product of matrices does not keep a machine busy
CHUNK_BYTES = 2**22  # of a chunk's logits in float32, where that is more rows
# A head's gradient is added up in parts. MLX makes room for what it will compute some operations
# ahead, about ten products, so parts must be small beside the whole. Then joining them is the peak:
# 2.1 gradients were measured on a CPU with 128,256 x 4,096 weights, 2.2 with 8,016 rows, but 3.2
# with half as many, whose parts are fewer.
PART_BYTES, MOST_PARTS = 2**21, 64

# (sum, what else is to be known of it): only the sum has a gradient.
Sums = tuple[mx.array, mx.array]


def chunk_rows(num_entries: int, num_bytes: int = CHUNK_BYTES) -> int:
    """Return how many rows of float32 logits a chunk has: so many bytes, and at least 256."""
    return max(CHUNK_ROWS, num_bytes // (4 * num_entries))


def chunked_loss(
    head: nn.Module,
    hidden: Float[mx.array, "N D"],
    loss: Callable[..., Sums],
    inputs: Sequence[mx.array],
    chunk_size: int = CHUNK_ROWS,
) -> Sums:
    """Return ``loss(head(hidden), *inputs)``, with its gradients, chunk by chunk.

    The head computes in its own type. The loss is given logits in float32, and what the chunks add
    to the head's gradients is added up in float32: so they leave here, whatever type the weights
    have.

    Args:
        head: Makes logits of hidden states; gradients reach its trainable parameters.
        hidden: What it is given, a row per token.
        loss: Takes logits and the chunk's rows of ``inputs``; returns two sums over its rows, of
            which the first has a gradient.
        inputs: Arrays with a row per token: goals, weights. They get no gradient.
        chunk_size: Tokens per chunk.

    Raises:
        ValueError: If a chunk has no tokens.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    parameters: dict[str, Any] = dict(tree_flatten(head.trainable_parameters()))
    backward = _Backward(head, list(parameters))
    counts: list[int] = []  # of the parts of every gradient

    @mx.custom_function
    def whole(rows: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, others = mx.array(0.0), mx.array(0.0)
        row_grads: list[mx.array] = []
        sums: list[list[mx.array]] = [[] for _ in weights]
        for start in range(0, rows.shape[0], chunk_size):
            here = slice(start, start + chunk_size)
            # A chunk waits for the one before, so that only one is in memory.
            done = [total, *row_grads[-1:], *chain.from_iterable(sums)]
            part = mx.depends([rows[here]], done)[0]
            goals = [mx.stop_gradient(array[here]) for array in inputs]
            logits = backward.logits(part, list(weights))
            on_logits = mx.value_and_grad(partial(_of_logits, loss, goals))
            (value, other), slope = on_logits(logits.astype(mx.float32))
            total, others = total + value, others + other
            gradient, sums = backward(part, list(weights), slope, logits.dtype, sums)
            row_grads.append(gradient)
        counts[:] = [len(parts) for parts in sums]
        return total, others, mx.concatenate(row_grads), *chain.from_iterable(sums)

    @whole.vjp
    def whole_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        # Scaled in place, part by part, before they are put together.
        rows, *scaled = (cotangents[0] * gradient for gradient in outputs[2:])
        parts = iter(scaled)
        weights = [_joined(list(islice(parts, count))) for count in counts]
        return rows.astype(primals[0].dtype), *weights

    total, others, *_ = whole(hidden, *parameters.values())  # pyright: ignore
    head.update(tree_unflatten(list(parameters.items())))
    return total, others


def _of_logits(loss: Callable[..., Sums], goals: list[mx.array], logits: mx.array) -> Sums:
    return loss(logits, *goals)


class _Backward:
    """A head's logits, and its gradients from theirs.

    A head that is one trained matrix adds to its gradient in one product; any other is asked for
    the gradients of a chunk.
    """

    def __init__(self, head: nn.Module, names: list[str]):
        self.head, self.names = head, names
        module = head.get("embed", head)
        plain = isinstance(module, nn.Linear | nn.Embedding)
        self.matrix = next(
            (at for at, name in enumerate(names) if plain and name in ("weight", "embed.weight")),
            None,
        )

    def logits(self, rows: mx.array, weights: list[mx.array]) -> mx.array:
        """Return the head's logits of some rows, with these weights."""
        self.head.update(tree_unflatten(list(zip(self.names, weights, strict=True))))
        return self.head(rows)

    def __call__(
        self,
        rows: mx.array,
        weights: list[mx.array],
        slope: mx.array,
        kind: mx.Dtype,
        sums: list[list[mx.array]],
    ) -> tuple[mx.array, list[list[mx.array]]]:
        """Return the gradient of some rows, and the weights' sums, in parts, with theirs added.

        ``slope`` is the logits' gradient in float32, ``kind`` the type that the head makes them in.
        """
        others = [at for at in range(len(weights)) if at != self.matrix]

        def forward(rows: mx.array, *some: mx.array) -> mx.array:
            given = list(weights)
            for at, weight in zip(others, some, strict=True):
                given[at] = weight
            return self.logits(rows, given)

        primals = [rows, *(weights[at] for at in others)]
        _, found = mx.vjp(forward, primals, [slope.astype(kind)])
        sums = list(sums)
        for at, gradient in zip(others, found[1:], strict=True):
            sums[at] = _added(sums[at], [gradient.astype(mx.float32)])
        if self.matrix is not None:
            sums[self.matrix] = _product_added(sums[self.matrix], slope, rows.astype(mx.float32))
        return found[0], sums


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _added(sums: list[mx.array], values: list[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(sums, values, strict=True)] if sums else values


def _product_added(sums: list[mx.array], slope: mx.array, rows: mx.array) -> list[mx.array]:
    """Return the parts of a matrix's gradient with ``slope.T @ rows`` added."""
    height = slope.shape[1]
    count = max(1, min(MOST_PARTS, 4 * height * rows.shape[1] // PART_BYTES))
    size = -(-height // count)
    slopes = [slope[:, start : start + size].T for start in range(0, height, size)]
    if not sums:
        return [part @ rows for part in slopes]
    return [mx.addmm(total, part, rows) for total, part in zip(sums, slopes, strict=True)]
