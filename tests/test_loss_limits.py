"""Losses at their limits: tiny features and zeros, half precision, equal examples, all tokens."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_distill.arrays import log_probs
from mlx_distill.losses import feature, relation, response
from mlx_distill.losses.chunked import CHUNK_BYTES, chunk_rows, chunked_loss

Loss = Callable[[mx.array, mx.array], mx.array]


def random(*shape: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return mx.array(values.astype(np.float32))


STUDENT, TEACHER = random(4, 3, 6, seed=1), random(4, 3, 6, seed=2)
LOGITS, OTHERS = random(2, 3, 6, seed=3), random(2, 3, 6, seed=4)
FLOW = lambda s, t: relation.flow_of_solution((s, s[..., :2]), (t, t[..., :2]))  # noqa: E731
FEATURES: dict[str, Loss] = {
    "hidden_mse": feature.hidden_mse,
    "raw hidden_mse": lambda s, t: feature.hidden_mse(s, t, relative=False),
    "hidden_cosine": feature.hidden_cosine,
    "patient_kd": feature.patient_kd,
    "attention_transfer": feature.attention_transfer,
    "flow_of_solution": FLOW,
    "similarity_preserving": relation.similarity_preserving,
    "relational_distance": relation.relational_distance,
    "relational_angle": relation.relational_angle,
    "probabilistic_transfer": relation.probabilistic_transfer,
    "neuron_selectivity": relation.neuron_selectivity,
    "contrastive": lambda s, t: relation.contrastive(s.reshape(4, -1), t.reshape(4, -1), 100),
}
OF_ANY_SIZE = sorted(FEATURES.keys() - {"raw hidden_mse"})


def finite(loss: Loss, student: mx.array, teacher: mx.array) -> bool:
    """Return whether a loss and its gradient are numbers."""
    total, gradient = mx.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    return bool(mx.isfinite(total).item()) and bool(mx.isfinite(gradient).all().item())


# --------------------------------------------------------------------------- features and relations


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_tiny_features_are_compared_as_large_ones(name: str) -> None:
    """What keeps a division from zero is far below them; maps are squares of the features."""
    expected = FEATURES[name](STUDENT, TEACHER)
    found = FEATURES[name](1e-2 * STUDENT, 1e-2 * TEACHER)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_features_that_are_zero(name: str, which: str) -> None:
    student = STUDENT if which == "teacher" else mx.zeros(STUDENT.shape)
    teacher = TEACHER if which == "student" else mx.zeros(TEACHER.shape)
    assert finite(FEATURES[name], student, teacher)
    if which == "both" and name in (
        "hidden_mse",
        "raw hidden_mse",
        "patient_kd",
        "flow_of_solution",
    ):
        assert not FEATURES[name](student, teacher).any().item()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("both", [True, False])
def test_features_in_half_precision_are_compared_in_float32(
    name: str, kind: mx.Dtype, both: bool
) -> None:
    """The values of half precision, but not its sums."""
    student = STUDENT.astype(kind)
    teacher = TEACHER.astype(kind) if both else TEACHER
    found = FEATURES[name](student, teacher)
    assert found.dtype == mx.float32
    expected = FEATURES[name](student.astype(mx.float32), teacher.astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FEATURES)
def test_a_teacher_of_features_gets_no_gradient(name: str) -> None:
    gradient = mx.grad(lambda teacher: FEATURES[name](STUDENT, teacher).sum())(TEACHER)
    assert not gradient.any().item()


@pytest.mark.parametrize("name", FEATURES)
def test_a_batch_of_equal_examples(name: str) -> None:
    """They have no distance, and no mean distance to measure others in."""
    equal = mx.broadcast_to(STUDENT[:1], STUDENT.shape)
    assert finite(FEATURES[name], equal, TEACHER)
    assert finite(FEATURES[name], STUDENT, equal)
    assert finite(FEATURES[name], equal, equal)


def test_examples_that_are_opposites() -> None:
    """The student says that they are never neighbours, the teacher that they are, or as he does."""
    student = mx.concatenate([STUDENT[:2], -STUDENT[:2]])
    assert finite(relation.probabilistic_transfer, student, TEACHER)
    assert finite(relation.probabilistic_transfer, student, student)


def test_an_example_has_its_own_neighbourhood() -> None:
    """Passalis and Tefas 2018: conditional on the example, whose neighbours' sum is one."""

    def neighbours(x: mx.array) -> np.ndarray:
        rows = np.array(x, np.float64).reshape(4, -1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        near = (rows @ rows.T + 1) / 2
        return near / near.sum(axis=1, keepdims=True)

    p, q = neighbours(TEACHER), neighbours(STUDENT)
    found = relation.probabilistic_transfer(STUDENT, TEACHER)
    np.testing.assert_allclose(found, (p * np.log(p / q)).mean(axis=1), rtol=1e-4)


# ------------------------------------------------------------------------------------------ answers


def test_entropy_counts_every_token() -> None:
    """Those of a wide even distribution, too; a barred one adds nothing."""
    even = mx.full((1, 50_000), -np.log(50_000))
    assert response.entropy(even).item() == pytest.approx(np.log(50_000), rel=1e-5)
    known = log_probs(mx.where(mx.arange(6) < 2, -mx.inf, LOGITS))
    exact = np.array(known, np.float64)[..., 2:]
    np.testing.assert_allclose(response.entropy(known), -(np.exp(exact) * exact).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "prior"])
def test_no_bucket_is_left_where_all_tokens_are_known(tail: str) -> None:
    """Though float32 leaves some mass over."""
    ids = mx.broadcast_to(mx.arange(6), LOGITS.shape)
    known = log_probs(OTHERS) - 1e-5

    def loss(student: mx.array) -> mx.array:
        return response.sparse_kl(log_probs(student), ids, known, tail, mx.zeros((6,))).sum()

    total, gradient = mx.value_and_grad(loss)(LOGITS)
    expected = mx.grad(lambda s: response.forward_kl(s, OTHERS).sum())(LOGITS)
    whole = response.forward_kl(LOGITS, OTHERS).sum().item()
    assert total.item() == pytest.approx(whole, rel=1e-3)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


def test_what_is_known_of_a_teacher_gets_no_gradient() -> None:
    ids = mx.broadcast_to(mx.arange(3), (2, 3, 3))
    for tail in ("bucket", "teacher", "both", "prior"):

        def loss(known: mx.array, tail: str = tail) -> mx.array:
            return response.sparse_kl(log_probs(LOGITS), ids, known, tail, mx.zeros((6,))).sum()

        assert not mx.grad(loss)(log_probs(OTHERS)[..., :3]).any().item()


@pytest.mark.parametrize("loss", [response.skew_forward_kl, response.skew_reverse_kl])
def test_a_skew_of_zero_is_no_skew(loss: Callable[..., mx.array]) -> None:
    student, teacher = log_probs(LOGITS), log_probs(OTHERS)
    plain = {
        response.skew_forward_kl: response.forward_kl(LOGITS, OTHERS),
        response.skew_reverse_kl: response.reverse_kl(student, teacher),
    }[loss]
    np.testing.assert_allclose(loss(student, teacher, 0.0), plain, rtol=1e-5)


def test_divergences_leave_the_error_of_a_normaliser_out() -> None:
    """A normaliser that is off by 1e-4 must not say that equals are 1e-4 apart."""
    teacher = log_probs(OTHERS)
    for sign in (1, -1):
        assert mx.abs(response.reverse_kl(teacher + sign * 1e-4, teacher)).max().item() < 1e-7


def test_a_position_that_counts_twice_has_twice_the_gradient() -> None:
    weights = mx.array([[1.0, 2, 0], [0.5, 3, 1]])
    found = mx.grad(lambda s: (weights * response.forward_kl(s, OTHERS)).sum())(LOGITS)
    exact = mx.softmax(LOGITS, axis=-1) - mx.softmax(OTHERS, axis=-1)
    np.testing.assert_allclose(found, weights[..., None] * exact, atol=1e-6)


# ------------------------------------------------------------------------------------------- chunks


def test_rows_of_a_chunk() -> None:
    """As many as fill the bytes, and never fewer than keep a machine busy."""
    assert chunk_rows(1000) == CHUNK_BYTES // 4000 == 1048
    assert chunk_rows(128_256) == chunk_rows(10**7) == 256
    assert chunk_rows(1000, 4_000_000) == 1000


def test_every_chunk_is_counted_and_in_float32() -> None:
    head = nn.Linear(4, 6)
    head.set_dtype(mx.bfloat16)
    hidden, weights = random(10, 4).astype(mx.bfloat16), mx.arange(10).astype(mx.float32)
    seen: list[Any] = []

    def loss(logits: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        seen.append(logits.dtype)
        return logits.sum(), mx.stack([weights.sum(), mx.array(1.0)])

    _, others = chunked_loss(head, hidden, loss, [weights], 3)
    np.testing.assert_allclose(others, [45, 4])  # the sum of all weights, and four chunks
    assert set(seen) == {mx.float32}
