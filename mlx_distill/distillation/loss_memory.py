"""What a loss over a vocabulary costs in memory, whole and chunk by chunk."""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten

from mlx_distill.arrays import to_number
from mlx_distill.losses.chunked import chunk_rows, chunked_loss
from mlx_distill.losses.response import Loss, forward_kl


class _Head(nn.Module):
    """A head behind hidden states that are learned, too."""

    def __init__(self, num_tokens: int, width: int, num_entries: int):
        super().__init__()
        self.hidden = mx.random.normal((num_tokens, width))
        self.head = nn.Linear(width, num_entries, bias=False)


def loss_memory(num_tokens: int, num_entries: int, width: int = 256) -> dict[str, Any]:
    """Return the peak memory of forward KL with its gradients, and how far these are apart.

    The teacher's logits are made by a head of its own from hidden states, as in training.

    Args:
        num_tokens: Of the batch.
        num_entries: Of the vocabulary.
        width: Of the hidden states.
    """
    mx.random.seed(0)
    student = _Head(num_tokens, width, num_entries)
    teacher = _Head(num_tokens, width, num_entries)
    mask = mx.ones((num_tokens,))
    mx.eval(student.parameters(), teacher.parameters(), mask)

    def on_rows(logits: mx.array, hidden: mx.array, mask: mx.array) -> Loss:
        return forward_kl(logits, teacher.head(hidden), mask)

    def whole(student: _Head) -> mx.array:
        return on_rows(student.head(student.hidden), teacher.hidden, mask)[0]

    def chunked(student: _Head) -> mx.array:
        size = chunk_rows(num_entries)
        inputs = [teacher.hidden, mask]
        return chunked_loss(student.head, student.hidden, on_rows, inputs, size)[0]

    found, grads = {}, {}
    for name, loss in (("whole", whole), ("chunked", chunked)):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        value, gradient = value_and_grad(student, loss)(student)
        mx.eval(value, gradient)
        found[f"{name}_bytes"] = mx.get_peak_memory() - before
        grads[name] = dict(tree_flatten(gradient))  # pyright: ignore
        del value, gradient
    distances = [
        to_number(mx.linalg.norm(grads["chunked"][k] - one) / mx.linalg.norm(one))
        for k, one in grads["whole"].items()
    ]
    share = found["chunked_bytes"] / found["whole_bytes"]
    return {
        "tokens": num_tokens,
        "entries": num_entries,
        **found,
        "share": share,
        "gradient_difference": max(distances),
    }
