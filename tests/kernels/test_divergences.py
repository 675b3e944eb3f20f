"""mlx-lm's divergences stand in for ours where Metal is: its functions, without the kernels."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner import losses

from mlx_distill import compat
from mlx_distill.arrays import log_probs
from mlx_distill.kernels.choice import VARIABLE, forced
from mlx_distill.losses.response import forward_kl, jensen_shannon

LOSSES = {
    "kl": forward_kl,
    "js": lambda student, teacher: jensen_shannon(log_probs(student), log_probs(teacher)),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let Metal's kernels seem to be there; return which are called."""
    names: list[str] = []

    def noting(name: str, function: compat.Divergence) -> compat.Divergence:
        def noted(student: mx.array, teacher: mx.array) -> mx.array:
            names.append(name)
            return function(student, teacher)

        return noted

    kernels = noting("kl", losses.kl_div_loss), noting("js", losses.js_div_loss)
    monkeypatch.setattr(compat, "divergence_kernels", lambda: kernels)
    return names


def pair(kind: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    student, teacher = 3 * mx.random.normal((2, 2, 3, 50), key=mx.random.key(0))
    if kind == "barred":
        teacher[..., 7] = student[..., 5:7] = teacher[..., 5] = teacher[..., 6] = -mx.inf
    elif kind == "apart":
        student[0, 1], teacher[1, 2] = 200 * student[0, 1], 200 * teacher[1, 2]
    elif kind == "infinite":
        student[0, 1, 4] = -mx.inf
    return student.astype(dtype), teacher.astype(dtype)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("kind", ["normal", "barred", "apart", "infinite"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_they_say_what_ours_say(name: str, kind: str, dtype: mx.Dtype, called: list[str]) -> None:
    student, teacher = pair(kind, dtype)
    cotangents = mx.arange(6.0).reshape(2, 3)

    def both() -> tuple[mx.array, mx.array]:
        function = LOSSES[name]
        values, gradients = mx.vjp(lambda x: function(x, teacher), [student], [cotangents])
        return values[0], gradients[0].astype(mx.float32)

    with forced(False):
        expected, expected_gradient = both()
    assert not called
    values, gradient = both()
    assert called == [name]
    assert values.dtype == mx.float32
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    finite = mx.isfinite(expected)[..., None] & mx.isfinite(student)
    zeros = mx.zeros_like(gradient)
    gradients = (mx.where(finite, x, zeros) for x in (gradient, expected_gradient))
    np.testing.assert_allclose(*gradients, rtol=1e-2, atol=2e-3 if dtype == mx.float16 else 1e-4)


def test_they_are_left_alone(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (log_probs(x) for x in pair("normal", mx.float32))
    jensen_shannon(student, teacher, beta=0.3)
    monkeypatch.setenv(VARIABLE, "off")
    forward_kl(student, teacher)
    jensen_shannon(student, teacher)
    assert not called
