"""Losses over a vocabulary without its logits: head, loss and gradient, a few tokens at a time.

The logits of a thousand tokens over fifty thousand entries are 200 MB in float32, and a loss and
its gradient hold several arrays of that size. Here they exist for one chunk of tokens only: the
gradient is computed with the loss, in the forward, and what is kept of it has the size of the
hidden states and of the head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.losses.response import Loss


def chunk_rows(num_entries: int) -> int:
    """Return how many rows of logits a chunk has: 4 MB of them, but enough to keep a GPU busy."""
    return max(32, 2**20 // num_entries)


def chunked_loss(
    head: nn.Module,
    hidden: Float[mx.array, "N D"],
    loss: Callable[..., Loss],
    inputs: Sequence[mx.array],
    chunk_size: int = 64,
) -> Loss:
    """Return ``loss(head(hidden), *inputs)``, with its gradients, chunk by chunk.

    Args:
        head: Makes logits of hidden states; gradients reach its trainable parameters.
        hidden: What it is given, a row per token.
        loss: Takes logits and the chunk's rows of ``inputs``; sums over its rows.
        inputs: Arrays with a row per token: goals, masks. They get no gradient.
        chunk_size: Tokens per chunk.

    Raises:
        ValueError: If a chunk has no tokens.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    parameters: dict[str, Any] = dict(tree_flatten(head.trainable_parameters()))
    names = list(parameters)

    def on_chunk(rows: mx.array, weights: list[mx.array], goals: list[mx.array]) -> Loss:
        head.update(tree_unflatten(list(zip(names, weights, strict=True))))
        return loss(head(rows), *goals)

    value_and_grad = mx.value_and_grad(on_chunk, argnums=(0, 1))

    @mx.custom_function
    def whole(rows: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, count = mx.array(0.0), mx.array(0.0)
        row_grads, weight_grads = [], [mx.zeros_like(weight) for weight in weights]
        for start in range(0, rows.shape[0], chunk_size):
            here = slice(start, start + chunk_size)
            # A chunk waits for the one before, so that only one is in memory.
            part = mx.depends([rows[here]], [total, *weight_grads])[0]
            goals = [mx.stop_gradient(array[here]) for array in inputs]
            (value, number), grads = value_and_grad(part, list(weights), goals)
            total, count = total + value, count + number
            row_grads.append(grads[0])
            weight_grads = [a + b for a, b in zip(weight_grads, grads[1], strict=True)]
        return total, count, mx.concatenate(row_grads), *weight_grads

    @whole.vjp
    def whole_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        return tuple(cotangents[0] * gradient for gradient in outputs[2:])

    total, count, *_ = whole(hidden, *parameters.values())  # pyright: ignore
    head.update(tree_unflatten(list(parameters.items())))
    return total, count
