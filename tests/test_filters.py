"""The filters keep mlx-lm's tokens, ties included, or say that they are not certain."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_distill.core import filters
from mlx_distill.core.filters import can_filter_fast, filter_exactly, filter_fast

V = 20_000
LAWS = [
    (0.95, 0.0, 0),
    (0.5, 0.0, 0),
    (0.999, 0.0, 0),
    (1.0, 0.0, 40),
    (1.0, 0.0, 2048),
    (0.9, 0.0, 50),
    (0.95, 0.02, 0),
    (1.0, 0.05, 20),
    (0.97, 0.01, 500),
]


def normal(spread: float) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda random: spread * random.standard_normal((6, V))


ROWS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "peaked": normal(6),
    "wide": normal(4),
    "flat": normal(1),
    "heavy tails": lambda random: 2 * random.standard_t(3, (6, V)),
    "one token": lambda random: np.where(np.arange(V) == random.integers(V, size=(6, 1)), 60, 0),
    "barred": lambda random: np.where(random.random((6, V)) < 0.3, -np.inf, normal(5)(random)),
}


def rows_of(kind: str, rounded: bool) -> mx.array:
    """Return six rows of logits; rounded ones tie often, as a bfloat16 head's do."""
    logits = mx.array(ROWS[kind](np.random.default_rng(len(kind))).astype(np.float32))
    return logits.astype(mx.bfloat16).astype(mx.float32) if rounded else logits


def kept(logits: mx.array) -> np.ndarray:
    return np.isfinite(np.array(logits))


def mlx_lms(logits: mx.array, top_p: float, min_p: float, top_k: int) -> np.ndarray:
    """Return the tokens that mlx-lm's filters keep."""
    logits = logits.astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # as mlx-lm does it
    if top_p < 1:
        logits = apply_top_p(logits, top_p)
    if min_p > 0:
        logits = apply_min_p(logits, min_p)
    if top_k:
        logits = apply_top_k(logits, top_k)
    return kept(logits)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_tokens_are_mlx_lms(law: tuple[float, float, int], kind: str, rounded: bool) -> None:
    logits = rows_of(kind, rounded)
    expected = mlx_lms(logits, *law)
    np.testing.assert_array_equal(kept(filter_exactly(logits, *law)), expected)
    assert can_filter_fast(V, law[0], law[2])
    found, certain = filter_fast(logits, *law)
    sure = np.broadcast_to(np.array(certain), (6,))
    np.testing.assert_array_equal(kept(found)[sure], expected[sure])


@pytest.mark.parametrize("kind", ["peaked", "wide", "heavy tails", "barred"])
def test_likely_rows_are_certain(kind: str) -> None:
    for law in LAWS[:2]:
        _, certain = filter_fast(rows_of(kind, False), *law)
        assert certain.sum().item() >= 5


def test_a_flat_row_is_not() -> None:
    _, certain = filter_fast(rows_of("flat", False), 0.95, 0.0, 0)
    assert not certain.any().item()


def test_ties_with_the_last_of_top_k_are_not() -> None:
    logits = mx.where(mx.arange(V) < 7, 5.0, 0.0)[None]
    assert not filter_fast(logits, 1.0, 0.0, 5)[1].item()
    assert filter_fast(logits, 1.0, 0.0, 7)[1].item()
    assert kept(filter_exactly(logits, 1.0, 0.0, 5)).sum() == 5


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_values_differ_by_a_constant_alone(law: tuple[float, float, int]) -> None:
    logits = rows_of("wide", False)
    found, certain = filter_fast(logits, *law)
    for row, exact, sure in zip(found, filter_exactly(logits, *law), certain, strict=True):
        if sure.item():
            np.testing.assert_allclose(mx.softmax(row), mx.softmax(exact), atol=1e-6)


def test_where_nothing_is_gained_all_tokens_are_looked_at() -> None:
    assert not can_filter_fast(2 * filters.CANDIDATES, 0.9, 0)
    assert not can_filter_fast(V, 1.0, 0)
    assert not can_filter_fast(V, 0.9, filters.CANDIDATES + 1)


@pytest.mark.parametrize("top_p", [1e-30, 1e-50])
def test_the_best_token_is_kept_whatever_the_share(top_p: float) -> None:
    """The smaller share is 0 in float32."""
    for size in (4, 3 * filters.CANDIDATES):
        logits = mx.arange(size).astype(mx.float32)[None] / size
        kept = filter_exactly(logits, top_p, 0.0, 0)
        assert (kept > -mx.inf).tolist() == [[False] * (size - 1) + [True]]
