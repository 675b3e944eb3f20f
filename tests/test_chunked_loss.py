"""The loss over a vocabulary in chunks: equal to the loss at once, in a fraction of its memory."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill.distillation.loss_memory import loss_memory
from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.losses.chunked import Sums, chunked_loss


def summed(name: str) -> Any:
    """Return a loss as the objective makes it: the sum that is learned, and further sums."""

    def loss(logits: mx.array, teacher: mx.array, mask: mx.array) -> Sums:
        terms = [LossTerm.parse(name), LossTerm("total_variation", 0.0)]
        labels = mx.zeros(mask.shape, mx.int32)
        total, sums = response_losses(terms, logits, Goal(teacher), labels, mask)
        return total, mx.stack(sums)

    return loss


LOSSES = {
    name: summed(name)
    for name in ("forward_kl", "reverse_kl:temperature=2", "jensen_shannon", "total_variation")
}
FORWARD_KL = LOSSES["forward_kl"]


class Student(nn.Module):
    def __init__(self, width: int, vocab_size: int, bias: bool):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size, bias=bias)


def relative_difference(found: Any, expected: Any) -> float:
    pairs = zip(tree_flatten(found), tree_flatten(expected), strict=True)
    return max(
        (mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-12)).item()  # pyright: ignore
        for (_, a), (_, b) in pairs
    )


def gradients(
    student: Student, loss: Any, x: mx.array, inputs: list[mx.array], chunk_size: int | None
) -> tuple[float, Any]:
    """Return the mean loss and its gradients; at once, or in chunks."""

    def mean(x: mx.array) -> mx.array:
        hidden = nn.silu(student.body(x))
        if chunk_size is None:
            total, others = loss(student.head(hidden), *inputs)
        else:
            total, others = chunked_loss(student.head, hidden, loss, inputs, chunk_size)
        return total / inputs[1].sum() + 0 * others.sum()

    value, grads = nn.value_and_grad(student, mean)(x)
    mx.eval(value, grads)
    return value.item(), grads  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_equal_the_whole(name: str, chunk_size: int) -> None:
    mx.random.seed(0)
    student = Student(6, 11, bias=True)
    x, teacher = mx.random.normal((13, 6)), mx.random.normal((13, 11))
    mask = (mx.arange(13) % 3 > 0).astype(mx.float32)
    expected = gradients(student, LOSSES[name], x, [teacher, mask], None)
    found = gradients(student, LOSSES[name], x, [teacher, mask], chunk_size)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert relative_difference(found[1], expected[1]) < 1e-4


def test_only_the_trainable_get_gradients() -> None:
    student = Student(6, 11, bias=True)
    student.head.freeze()
    x, teacher, mask = mx.ones((5, 6)), mx.random.normal((5, 11)), mx.ones((5,))
    expected = gradients(student, FORWARD_KL, x, [teacher, mask], None)
    found = gradients(student, FORWARD_KL, x, [teacher, mask], 2)
    assert "head" not in found[1] or not tree_flatten(found[1]["head"])
    assert relative_difference(found[1], expected[1]) < 1e-4


def test_the_head_keeps_its_parameters() -> None:
    student = Student(6, 11, bias=False)
    before = np.array(student.head.weight)
    x, teacher, mask = mx.ones((5, 6)), mx.random.normal((5, 11)), mx.ones((5,))
    for _ in range(2):
        gradients(student, FORWARD_KL, x, [teacher, mask], 2)
        np.testing.assert_array_equal(student.head.weight, before)


def test_memory_is_a_fraction() -> None:
    """With a teacher whose logits are made chunk by chunk, too."""
    mx.random.seed(0)
    student = Student(16, 4000, bias=False)
    teacher_head, teacher_hidden = nn.Linear(16, 4000, bias=False), mx.random.normal((1024, 16))
    x, mask = mx.random.normal((1024, 16)), mx.ones((1024,))
    mx.eval(student.parameters(), teacher_head.parameters(), teacher_hidden, x)

    def loss(logits: mx.array, hidden: mx.array, mask: mx.array) -> Sums:
        return FORWARD_KL(logits, teacher_head(hidden), mask)

    peaks = []
    for chunk_size in (None, 64):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradients(student, loss, x, [teacher_hidden, mask], chunk_size)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.25 * peaks[0]


def test_two_gradients_and_a_half_of_a_wide_head() -> None:
    """With chunks of 256 tokens, which are a sixteenth of such a head."""
    found = loss_memory(264, 8016, width=4096, compare=False)
    assert found["head_gradients"] < 2.5


def test_chunks_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_loss(nn.Linear(2, 3), mx.ones((4, 2)), FORWARD_KL, [], 0)
