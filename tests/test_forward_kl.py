"""The divergence that a drafter learns by, against SciPy's and finite differences."""

import mlx.core as mx
import numpy as np
import pytest
from oracles.sampling import softmax
from scipy.special import log_softmax, rel_entr

from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.losses.response import entropy, forward_kl


def random_teacher(*shape: int, scale: float = 2.0) -> np.ndarray:
    """Return float64 probabilities."""
    return softmax(scale * np.random.default_rng(7).normal(size=shape))


def random_logits(*shape: int, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(8).normal(size=shape)


def slow_kl(teacher: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return KL(teacher || student) at every position, in float64."""
    return rel_entr(teacher, softmax(logits)).sum(axis=-1)


def kl(
    teacher: np.ndarray | mx.array, logits: np.ndarray | mx.array, mask: np.ndarray | None = None
) -> tuple[mx.array, mx.array]:
    """Return the package's divergence, in float32; no mask counts all positions."""
    probs = teacher if isinstance(teacher, mx.array) else mx.array(teacher.astype(np.float32))
    student = logits if isinstance(logits, mx.array) else mx.array(logits.astype(np.float32))
    weights = np.ones(probs.shape[:-1]) if mask is None else mask
    values = forward_kl(student, mx.log(probs), probs)
    mask = mx.array(weights.astype(np.float32))
    return weighted_sum(values, mask), mask.sum()


def test_the_divergence_equals_scipys():
    teacher, logits = random_teacher(5, 9, 13), random_logits(5, 9, 13)
    total, count = kl(teacher, logits)
    assert total.item() == pytest.approx(slow_kl(teacher, logits).sum(), rel=1e-5)
    assert count.item() == 45


def test_the_mask_weighs_the_sum_and_the_count():
    teacher, logits = random_teacher(5, 9, 13), random_logits(5, 9, 13)
    mask = np.random.default_rng(9).choice([0, 0.5, 1], (5, 9))
    total, count = kl(teacher, logits, mask)
    assert total.item() == pytest.approx((slow_kl(teacher, logits) * mask).sum(), rel=1e-5)
    assert count.item() == pytest.approx(mask.sum())


def test_a_sure_teacher_leaves_the_cross_entropy():
    teacher, logits = np.eye(13)[[3, 0, 12, 5]], random_logits(4, 13)
    expected = -log_softmax(logits, axis=-1)[range(4), [3, 0, 12, 5]].sum()
    total, _ = kl(teacher, logits)
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_tokens_without_mass_contribute_nothing():
    teacher = np.array([[0.25, 0.75, 0.0, 0.0]])
    logits = np.array([[1.0, -2.0, 0.5, 30.0]])
    total, _ = kl(teacher, logits)
    assert total.item() == pytest.approx(slow_kl(teacher, logits).item(), rel=1e-5)


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_large_logits_do_not_overflow(scale: float):
    teacher, logits = random_teacher(20, 13, scale=scale), random_logits(20, 13, scale=scale)
    # SciPy's probabilities underflow where float64's logarithms do not.
    log_teacher = log_softmax(scale * np.random.default_rng(7).normal(size=(20, 13)), axis=-1)
    expected = (teacher * (log_teacher - log_softmax(logits, axis=-1))).sum()
    total, _ = kl(teacher, logits)
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_divided_in_float32(dtype: mx.Dtype):
    teacher, logits = random_teacher(5, 9, 13), mx.array(random_logits(5, 9, 13)).astype(dtype)
    total, _ = kl(teacher, logits)
    expected = slow_kl(teacher, np.array(logits.astype(mx.float32), np.float64)).sum()
    assert total.dtype == mx.float32
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_divergence_is_not_negative_and_zero_where_equal(scale: float):
    logits = random_logits(50, 13, scale=scale)
    teacher = random_teacher(50, 13, scale=scale)
    for row in range(50):
        assert kl(teacher[row], logits[row])[0].item() > 0
        assert abs(kl(softmax(logits)[row], logits[row])[0].item()) < 1e-5


@pytest.mark.parametrize("constant", [-40.0, 11.0, 200.0])
def test_a_constant_added_to_the_students_logits_changes_nothing(constant: float):
    teacher, logits = random_teacher(6, 13), random_logits(6, 13)
    shifted, _ = kl(teacher, logits + constant)
    assert shifted.item() == pytest.approx(kl(teacher, logits)[0].item(), rel=1e-4)


def test_the_gradient_equals_finite_differences():
    teacher, logits = random_teacher(3, 4, 7), random_logits(3, 4, 7)
    mask = np.random.default_rng(9).random((3, 4))

    def slow_total(logits: np.ndarray) -> float:
        return (slow_kl(teacher, logits) * mask).sum()

    expected = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        expected[place] = (slow_total(logits + step) - slow_total(logits - step)) / 2e-5
    student = mx.array(logits.astype(np.float32))
    found = mx.grad(lambda x: kl(teacher, x, mask)[0])(student)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_the_gradient_has_the_logits_precision():
    logits = mx.array(random_logits(4, 7)).astype(mx.float16)
    found = mx.grad(lambda x: kl(random_teacher(4, 7), x)[0])(logits)
    assert found.dtype == mx.float16
    expected = softmax(np.array(logits, np.float64)) - random_teacher(4, 7)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-3)


def test_the_teachers_probabilities_get_no_gradient():
    probs = mx.array(random_teacher(4, 7).astype(np.float32))
    logits = mx.array(random_logits(4, 7).astype(np.float32))

    def total(probs: mx.array) -> mx.array:
        return forward_kl(logits, mx.log(probs), probs).sum()

    assert mx.abs(mx.grad(total)(probs)).max().item() == 0


def test_entropy_in_nats():
    probs = random_teacher(6, 13)
    expected = -(probs * np.log(probs)).sum(axis=-1)
    found = entropy(mx.array(np.log(probs).astype(np.float32)))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    certain = mx.array([[0.0, -np.inf, -np.inf]])
    assert entropy(certain).tolist() == [0.0]
