"""Exponentials made of powers of two: MLX's values, and only where they are faster."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_distill import arrays
from mlx_distill.kernels import choice, exponentials
from mlx_distill.kernels.exponentials import log_sum_exp, sigmoid, silu, tanh

ENDS = [0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, 89.0, -89.0, 200.0, -200.0, 1e30, -1e30, np.nan]
OWN = [(sigmoid, mx.sigmoid), (tanh, mx.tanh), (silu, nn.silu)]


@pytest.fixture
def by_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "by_powers", lambda: True)


@pytest.mark.parametrize(("found", "expected"), OWN)
def test_functions_are_those_of_mlx(
    by_powers: None, found: Callable[..., mx.array], expected: Callable[..., mx.array]
) -> None:
    some = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 5
    x = mx.array(np.concatenate([np.array(ENDS, np.float32), some]))
    np.testing.assert_allclose(found(x), expected(x), rtol=1e-5, atol=3e-7)
    half = x.astype(mx.bfloat16)
    assert mx.array_equal(found(half), expected(half), equal_nan=True)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("columns", [1, 7, 1536, 16384])
def test_sums_of_rows_are_those_of_mlx(by_powers: None, size: float, columns: int) -> None:
    rows = np.random.default_rng(columns).normal(size=(5, columns)).astype(np.float32) * size
    rows[1, ::2] = -np.inf
    rows[2] = -np.inf
    rows[3, -1] = np.nan
    x = mx.array(rows)
    expected = arrays.log_sum_exp(x)
    np.testing.assert_allclose(log_sum_exp(x), expected, rtol=1e-6, atol=1e-6)


def test_without_powers_a_sum_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has it: the exact sum of a wide row would be several."""
    monkeypatch.setattr(exponentials, "by_powers", lambda: False)
    x = mx.random.normal((3, 16384), key=mx.random.key(0))
    expected = mx.logsumexp(x, axis=-1, keepdims=True)
    assert not mx.array_equal(arrays.log_sum_exp(x), expected)
    assert mx.array_equal(log_sum_exp(x), expected)


def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for faster in (True, False):
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        monkeypatch.setattr(exponentials, "_are_faster", lambda found=faster: found)
        for how, taken in (("off", False), ("force", True), ("probe", faster)):
            monkeypatch.setenv(choice.VARIABLE, how)
            assert exponentials.by_powers() is taken
        before = exponentials.left_out.set(True)
        assert not exponentials.by_powers()
        exponentials.left_out.reset(before)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert not exponentials.by_powers()
        monkeypatch.undo()
