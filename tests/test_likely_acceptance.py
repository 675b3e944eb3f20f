"""The loss on acceptance against a float64 twin, with finite differences for its gradient."""

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, softmax, xlogy

from mlx_distill.losses.acceptance import likely_acceptance


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng([seed, *shape]).normal(size=shape)


def slow_parts(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the divergence and the share that is accepted, in float64."""
    p = softmax(teacher, axis=-1)
    log_q = np.where(p > 0, log_softmax(student, axis=-1), 0)
    divergence = (xlogy(p, p) - p * log_q).sum(-1)
    return divergence, np.minimum(p, softmax(student, axis=-1)).sum(-1)


def slow_loss(
    student: np.ndarray, teacher: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return the mixture, with its own weight or a given one."""
    divergence, accepted = slow_parts(student, teacher)
    weight = np.exp(-3 * accepted) if weight is None else weight
    return weight * divergence + (1 - weight) * (1 - accepted)


def found(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    arrays = (mx.array(x.astype(np.float32)) for x in (student, teacher))
    return np.array(likely_acceptance(*arrays))


def slope(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    goal = mx.array(teacher.astype(np.float32))
    logits = mx.array(student.astype(np.float32))
    return np.array(mx.grad(lambda x: likely_acceptance(x, goal).sum())(logits))


@pytest.mark.parametrize(("scale", "width"), [(2.0, 9), (0.01, 9), (30.0, 9), (2.0, 50_000)])
def test_the_value_is_the_mixture(scale: float, width: int) -> None:
    student, teacher = (random_logits(3, width, seed=seed, scale=scale) for seed in (1, 2))
    expected = slow_loss(student, teacher)
    np.testing.assert_allclose(found(student, teacher), expected, rtol=1e-4, atol=1e-6)


def test_equals_cost_nothing_and_a_constant_changes_nothing() -> None:
    student, teacher = random_logits(4, 9, seed=1), random_logits(4, 9, seed=2)
    np.testing.assert_allclose(found(teacher, teacher), 0, atol=1e-6)
    np.testing.assert_allclose(slope(teacher, teacher), 0, atol=1e-6)
    shifted = found(student + 500, teacher - 300)
    np.testing.assert_allclose(shifted, found(student, teacher), rtol=1e-3)


def test_the_gradient_equals_finite_differences_at_a_fixed_weight() -> None:
    student, teacher = random_logits(5, 7, seed=3), random_logits(5, 7, seed=4)
    weight = np.exp(-3 * slow_parts(student, teacher)[1])
    expected = np.zeros_like(student)
    for place in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[place] = 1e-6
        up, down = (slow_loss(student + sign * step, teacher, weight).sum() for sign in (1, -1))
        expected[place] = (up - down) / 2e-6
    np.testing.assert_allclose(slope(student, teacher), expected, atol=1e-5)


def test_barred_tokens() -> None:
    """Barred by the teacher they cost what they take; barred by the student alone, all."""
    student, teacher = random_logits(3, 6, seed=5), random_logits(3, 6, seed=6)
    teacher[:, 1] = -np.inf
    student[0, 1] = student[1, 2] = -np.inf
    expected = slow_loss(student, teacher)
    assert np.isinf(expected).tolist() == [False, True, False]
    np.testing.assert_allclose(found(student, teacher), expected, rtol=1e-5)
    gradient = slope(student, teacher)
    assert np.isfinite(gradient).all()
    assert gradient[0, 1] == 0
    assert gradient[2, 1] > 0


def test_distributions_that_do_not_meet_are_led_by_the_divergence() -> None:
    student, teacher = np.zeros((1, 4)), np.zeros((1, 4))
    student[0, 0] = teacher[0, 3] = 60
    assert found(student, teacher) == pytest.approx(60, rel=1e-5)
    np.testing.assert_allclose(slope(student, teacher), [[1, 0, 0, -1]], atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: mx.Dtype) -> None:
    student, teacher = (mx.array(random_logits(3, 9, seed=seed)).astype(dtype) for seed in (7, 8))
    value = likely_acceptance(student, teacher)
    assert value.dtype == mx.float32
    expected = slow_loss(*(np.array(x.astype(mx.float32)) for x in (student, teacher)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert mx.grad(lambda x: likely_acceptance(x, teacher).sum())(student).dtype == dtype


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (mx.array(random_logits(3, 9, seed=seed)) for seed in (1, 2))
    assert not mx.grad(lambda x: likely_acceptance(student, x).sum())(teacher).any().item()
