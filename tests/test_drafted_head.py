"""The target's head for the tokens that can be drafted, and narrower heads made of it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.distillation.drafted_head import narrowed


def random_rows(width: int) -> mx.array:
    """Return rows of a head that reach further along some directions than along others."""
    draws = np.random.default_rng(3)
    spread = draws.normal(size=(40, width)) * np.geomspace(1, 0.01, width)
    return mx.array((spread @ np.linalg.qr(draws.normal(size=(width, width)))[0]).astype("float32"))


@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_narrow_head_keeps_the_largest_singular_values(width: int) -> None:
    rows = random_rows(8)
    kept = np.linalg.svd(np.array(narrowed(rows, width)), compute_uv=False)
    expected = np.linalg.svd(np.array(rows), compute_uv=False)[:width]
    np.testing.assert_allclose(kept, expected, rtol=1e-3)


def test_tokens_that_were_alike_stay_alike() -> None:
    """Along the directions that are kept, rows have the products that they had."""
    rows = random_rows(8)
    narrow = np.array(narrowed(rows, 5))
    np.testing.assert_allclose(narrow @ narrow.T, np.array(rows @ rows.T), atol=0.03)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_head_that_is_wide_enough_stays_as_it_is(dtype: mx.Dtype) -> None:
    rows = random_rows(8).astype(dtype)
    assert mx.array_equal(narrowed(rows, 8), rows)
    assert narrowed(rows, 4).dtype == dtype
