"""What a loss over a vocabulary costs in memory, whole and chunk by chunk."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten

from mlx_distill.arrays import to_number
from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.losses.chunked import Sums, chunk_rows, chunked_loss
from mlx_distill.losses.response import forward_kl


class _Head(nn.Module):
    """A head behind hidden states that are learned, too."""

    def __init__(self, num_tokens: int, width: int, num_entries: int, kind: mx.Dtype):
        super().__init__()
        scale = width**-0.5
        self.hidden = mx.random.normal((num_tokens, width), kind)
        self.head = nn.Linear(1, 1, bias=False)
        self.head.weight = mx.random.normal((num_entries, width), kind, scale=scale)


def loss_memory(
    num_tokens: int,
    num_entries: int,
    width: int = 256,
    kind: mx.Dtype = mx.float32,
    compare: bool = True,
) -> dict[str, Any]:
    """Return the peak memory of forward KL with its gradients, beyond what it is given.

    The teacher's logits are made by a head of its own from hidden states, as in training.

    Args:
        num_tokens: Of the batch.
        num_entries: Of the vocabulary.
        width: Of the hidden states.
        kind: Of the hidden states and the heads; gradients of the head are float32.
        compare: Also measure the loss at once, and how far the gradients are apart.
    """
    mx.random.seed(0)
    student = _Head(num_tokens, width, num_entries, kind)
    teacher = _Head(num_tokens, width, num_entries, kind)
    mask = mx.ones((num_tokens,))
    mx.eval(student.parameters(), teacher.parameters(), mask)

    def on_rows(logits: mx.array, hidden: mx.array, mask: mx.array) -> Sums:
        total = weighted_sum(forward_kl(logits, teacher.head(hidden)), mask)
        return total, mx.stop_gradient(total)

    def whole(student: _Head) -> mx.array:
        return on_rows(student.head(student.hidden), teacher.hidden, mask)[0]

    def chunked(student: _Head) -> mx.array:
        size = chunk_rows(num_entries)
        inputs = [teacher.hidden, mask]
        return chunked_loss(student.head, student.hidden, on_rows, inputs, size)[0]

    peak, gradients = _measured(student, chunked)
    head = 4 * num_entries * width
    found = {
        "tokens": num_tokens,
        "entries": num_entries,
        "width": width,
        "chunked_bytes": peak,
        "head_gradients": peak / head,
    }
    if compare:
        at_once, expected = _measured(student, whole)
        distances = [
            to_number(mx.linalg.norm(gradients[k] - one) / mx.linalg.norm(one))
            for k, one in expected.items()
        ]
        found |= {"whole_bytes": at_once, "share": peak / at_once}
        found["gradient_difference"] = max(distances)
    return found


def _measured(student: _Head, loss: Callable[[_Head], mx.array]) -> tuple[int, dict[str, mx.array]]:
    """Return the peak memory of a loss and its gradients, and these."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    value, gradient = value_and_grad(student, loss)(student)
    mx.eval(value, gradient)
    peak = mx.get_peak_memory() - before
    flat: dict[str, Any] = dict(tree_flatten(gradient))
    return peak, {name: array.astype(mx.float32) for name, array in flat.items()}
