"""The target's head for the tokens that can be drafted, and drafters' heads made of it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.distillation.drafted_head import factored, start_head
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig


def random_rows(width: int) -> mx.array:
    """Return rows of a head that reach further along some directions than along others."""
    draws = np.random.default_rng(3)
    spread = draws.normal(size=(40, width)) * np.geomspace(1, 0.01, width)
    return mx.array((spread @ np.linalg.qr(draws.normal(size=(width, width)))[0]).astype("float32"))


def drafter_of(exit_dim: int, rank: int | None) -> RecurrentDrafter:
    return RecurrentDrafter(RecurrentDrafterConfig(8, 40, exit_dim, 1, head_rank=rank))


@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_factors_are_as_near_as_their_rank_allows(rank: int) -> None:
    """What is left has the norm of the singular values that were left out."""
    rows = random_rows(8)
    narrow, directions = map(np.array, factored(rows, rank))
    values = np.linalg.svd(np.array(rows), compute_uv=False)
    left = np.linalg.norm(narrow @ directions - np.array(rows))
    assert left == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-2, abs=1e-5)
    np.testing.assert_allclose(directions @ directions.T, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_factors_have_the_type_of_the_head(dtype: mx.Dtype) -> None:
    assert {part.dtype for part in factored(random_rows(8).astype(dtype), 4)} == {dtype}


def test_a_head_as_wide_as_the_targets_is_the_targets() -> None:
    rows, drafter = random_rows(8), drafter_of(8, None)
    start_head(drafter, rows)
    assert mx.array_equal(drafter.head.weight, rows)


def test_a_head_of_two_matrices_begins_near_the_targets() -> None:
    rows, drafter = random_rows(8), drafter_of(8, 5)
    start_head(drafter, rows)
    product = drafter.head.weight @ drafter.lm_head[-2].weight
    np.testing.assert_allclose(np.array(product), np.array(rows), atol=0.1)


def test_a_narrow_head_keeps_which_tokens_are_alike() -> None:
    rows, drafter = random_rows(8), drafter_of(5, None)
    start_head(drafter, rows)
    head = np.array(drafter.head.weight)
    np.testing.assert_allclose(head @ head.T, np.array(rows @ rows.T), atol=0.03)


def test_a_wider_head_stays_as_it_is() -> None:
    drafter = drafter_of(16, None)
    before = drafter.head.weight
    start_head(drafter, random_rows(8))
    assert mx.array_equal(drafter.head.weight, before)
