"""Every response loss over the 128,256 entries of a real vocabulary, against float64.

Logits as a real model has them, in the types that it makes them in: sums of so many small terms
show what a vocabulary of six does not.
"""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.terms import RESPONSE, LossTerm
from mlx_distill.losses import response

V, ROWS, TOP = 128_256, 2, 64
LABELS = np.array([7, 100_000])
TYPES = {
    "float32": (mx.float32, 1e-5),
    "float16": (mx.float16, 1e-3),
    "bfloat16": (mx.bfloat16, 1e-3),
}


@cache
def logits(kind: str, noise: float) -> tuple[mx.array, mx.array]:
    """Return a student's and a teacher's logits: the best token at +29, the others around 9."""
    random = np.random.default_rng(0)
    teacher = random.standard_normal((ROWS, V)) * 3 + 9
    teacher[np.arange(ROWS), LABELS] = 26, 29
    student = teacher + noise * random.standard_normal((ROWS, V))
    dtype = TYPES[kind][0]
    return mx.array(student.astype(np.float32)).astype(dtype), mx.array(
        teacher.astype(np.float32)
    ).astype(dtype)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) of each row."""
    return (p * (np.log(p) - np.log(q))).sum(-1)


def exact(name: str, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return a loss in float64, written down as in its paper."""
    q, p = (np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True)) for x in (student, teacher))
    rows = np.arange(ROWS)
    if name == "decoupled_kd":
        true, own = p[rows, LABELS], q[rows, LABELS]
        others = np.ones(p.shape, bool)
        others[rows, LABELS] = False
        binary = kl(np.stack([true, 1 - true], -1), np.stack([own, 1 - own], -1))
        rest = (x[others].reshape(ROWS, -1) for x in (p, q))
        return binary + 8 * kl(*(x / x.sum(-1, keepdims=True) for x in rest))
    if name == "sparse_kl":
        top = np.argsort(-p, axis=-1)[:, :TOP]
        known, own = (np.take_along_axis(x, top, -1) for x in (p, q))
        known, own = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (known, own))
        return kl(known, own)
    return {
        "hard": lambda: -np.log(q[rows, LABELS]),
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
        "total_variation": lambda: np.abs(p - q).sum(-1) / 2,
        "soft_cross_entropy": lambda: -(p * np.log(q)).sum(-1),
        "logit_mse": lambda: np.square(student - teacher).mean(-1),
        "sorted_l1": lambda: np.abs(np.sort(p, -1) - np.sort(q, -1)).sum(-1),
    }[name]()


@pytest.mark.parametrize("noise", [1.0, 0.1])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", RESPONSE)
def test_the_value_is_that_of_float64(name: str, kind: str, noise: float) -> None:
    """Where both nearly agree, what they differ by is off by a logarithm's rounding, 1e-6."""
    student, teacher = logits(kind, noise)
    found, _ = response_losses(
        [LossTerm(name)], student, Goal(teacher), mx.array(LABELS), mx.ones((ROWS,))
    )
    wide = (np.array(x.astype(mx.float32), np.float64) for x in (student, teacher))
    assert found.item() == pytest.approx(exact(name, *wide).sum(), rel=TYPES[kind][1], abs=5e-6)


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_the_gradient_is_that_of_float64(noise: float) -> None:
    """A softmax whose sum is off by 1.8e-4 makes every entry wrong by as much."""
    student, teacher = logits("float32", noise)
    found = mx.grad(lambda s: response.forward_kl(s, teacher).sum())(student)
    wide = (np.array(x, np.float64) for x in (student, teacher))
    q, p = (np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True)) for x in wide)
    np.testing.assert_allclose(found, q - p, rtol=0, atol=3e-5 * p.max())
    others = np.ones(p.shape, bool)  # than the best ones, whose probabilities nearly cancel
    others[np.arange(ROWS), LABELS] = False
    error = np.abs(np.array(found) - (q - p))[others] / (q + p)[others]
    assert error.max() < 3e-5
