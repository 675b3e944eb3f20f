"""A shortlist of columns: it holds the best ones, and their logits are exact."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill import InputError
from mlx_distill.drafters import shortlist
from mlx_distill.drafters.shortlist import (
    FILE,
    Directions,
    Shortlist,
    directions_of,
    read_directions,
)


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


def test_directions_of_a_heads_inputs_list_what_those_of_its_rows_do_not() -> None:
    """Rows that differ everywhere, and inputs in a few directions, seldom in others."""
    random = np.random.default_rng(0)
    weight = mx.array(random.normal(size=(160, 16)).astype(np.float32))
    some = random.normal(size=(400, 3)) @ random.normal(size=(3, 16))
    inputs = mx.array((some + 0.01 * random.normal(size=some.shape)).astype(np.float32))
    best = np.array(inputs @ weight.T).argmax(axis=1)

    def share(directions: Directions | None) -> float:
        listed = Shortlist(weight, directions)(inputs, None, 1.0, None).tokens
        return float((np.array(listed) == best[:, None]).any(axis=1).mean())

    assert share(directions_of(weight, inputs[:200])) > 0.99
    assert share(None) < 0.95


def test_directions_come_back_from_a_folder_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    assert read_directions(tmp_path, 16) is None
    weight = mx.random.normal((160, 16))
    kept = directions_of(weight, mx.random.normal((40, 16)))
    mx.save_safetensors(str(tmp_path / FILE), kept._asdict())
    found = read_directions(tmp_path, 16)
    assert found is not None
    assert all(mx.array_equal(a, b) for a, b in zip(found, kept, strict=True))
    into, back = kept
    wrong = {
        "fit": [
            {"into": into},
            {"into": into, "back": back[:, :2]},
            {"into": into[0], "back": into[0]},
        ],
        "finite": [{"into": into / 0, "back": back}],
    }
    for said, files in wrong.items():
        for arrays in files:
            mx.save_safetensors(str(tmp_path / FILE), arrays)
            with pytest.raises(InputError, match=said):
                read_directions(tmp_path, 16)
    mx.save_safetensors(str(tmp_path / FILE), kept._asdict())
    with pytest.raises(InputError, match="does not fit"):
        read_directions(tmp_path, 32)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-20])
    with pytest.raises(InputError):
        read_directions(tmp_path, 16)
