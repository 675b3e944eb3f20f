"""A shortlist of columns: it holds the best ones, and their logits are exact."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.drafters import shortlist
from mlx_distill.drafters.shortlist import Shortlist


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "DIRECTIONS", 4)
    monkeypatch.setattr(shortlist, "LISTED", 8)


@pytest.mark.parametrize("noisy", [False, True])
def test_of_a_head_of_few_directions_the_best_columns_are_listed(noisy: bool) -> None:
    """As the tokens that they stand for."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(160, 4)) @ random.normal(size=(4, 16))
    x = random.normal(size=(3, 16))
    noise = 3 * random.normal(size=(1, 160)) if noisy else None
    rows = None if noise is None else mx.array(noise.astype(np.float32))
    made = Shortlist(mx.array(weight.astype(np.float32)))
    token_ids = mx.arange(1000, 1160)
    found = made(mx.array(x.astype(np.float32)), rows, 1.5, token_ids)
    unmapped = made(mx.array(x.astype(np.float32)), rows, 1.5, None)
    np.testing.assert_array_equal(np.array(found.tokens), np.array(unmapped.tokens) + 1000)
    expected = 1.5 * (x @ weight.T + (0 if noise is None else noise))
    best = np.sort(8 * expected.reshape(3, -1, 8).argmax(1) + np.arange(8))  # of each 8-th column
    columns = np.array(found.tokens) - 1000
    order = np.argsort(columns)
    np.testing.assert_array_equal(np.take_along_axis(columns, order, 1), best)
    logits = np.take_along_axis(np.array(found.logits), order, 1)
    np.testing.assert_allclose(logits, np.take_along_axis(expected, best, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "pays"),
    [
        ((128, 16), mx.float32, True),
        ((127, 16), mx.float32, False),
        ((128, 15), mx.float32, False),
        ((128, 1025), mx.float32, False),
        ((128, 16), mx.float16, False),
    ],
)
def test_where_a_shortlist_pays(shape: tuple[int, int], dtype: mx.Dtype, pays: bool) -> None:
    assert Shortlist.pays(mx.zeros(shape, dtype)) is pays
