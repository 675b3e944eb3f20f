"""A trained drafter's head becomes two matrices that are nearest to it where it is used."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from half_models import REFERENCE

import mlx_distill
from mlx_distill import InputError, convert
from mlx_distill.distillation.narrow_head import narrow_head, narrowed, second_moment, shares_of
from mlx_distill.distillation.responses import Response
from mlx_distill.target.target import Target

DRAFTER = REFERENCE


@pytest.fixture(scope="module")
def answers(bundled_pair: tuple[Any, Any]) -> list[Response]:
    model, tokenizer = bundled_pair
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Tom had a red ball")]
    return [
        Response(
            prompt,
            [
                one.token
                for one in mlx_distill.stream_generate(model, tokenizer, prompt, max_tokens=40)
            ],
        )
        for prompt in prompts
    ]


def variance(weight: np.ndarray, product: np.ndarray, x: np.ndarray, shares: np.ndarray) -> float:
    """Return the mean variance, under the shares, of what two heads' logits differ by."""
    off = x @ (weight - product).T
    return float(np.mean((off - (off @ shares)[:, None]) ** 2 @ shares))


@pytest.mark.parametrize("is_even", [True, False])
def test_no_other_matrix_of_that_rank_is_nearer(is_even: bool) -> None:
    draws = np.random.default_rng(5)
    weight = draws.normal(size=(30, 6)).astype(np.float32)
    x = draws.normal(size=(200, 6)) * [9, 1, 5, 0.1, 2, 0.01]
    shares = np.ones(30) / 30 if is_even else draws.dirichlet(np.full(30, 0.3)) * 0.97 + 0.001
    head, before = map(np.array, narrowed(mx.array(weight), x.T @ x / 200, shares, 2))
    found = variance(weight, head @ before, x, shares)
    centred = np.sqrt(shares)[:, None] * (weight - shares @ weight) @ x.T / np.sqrt(200)
    left = np.linalg.svd(centred, compute_uv=False)[2:]
    assert found == pytest.approx(float(np.sum(left**2)), rel=1e-3)


def test_a_rank_that_is_enough_changes_no_probability() -> None:
    draws = np.random.default_rng(6)
    weight = draws.normal(size=(30, 3)) @ draws.normal(size=(3, 8)) + draws.normal(size=8)
    head, before = narrowed(mx.array(weight.astype(np.float32)), np.eye(8), np.full(30, 1 / 30), 3)
    x = mx.array(draws.normal(size=(5, 8)).astype(np.float32))
    found = mx.softmax((x @ before.T) @ head.T, axis=-1)
    expected = mx.softmax(x @ mx.array(weight.astype(np.float32)).T, axis=-1)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)


def test_what_the_head_is_given_is_counted_along_drafts(
    bundled_pair: tuple[Any, Any], answers: list[Response]
) -> None:
    drafter = mlx_distill.load_drafter(DRAFTER, *bundled_pair)
    spread = second_moment(drafter, Target.of(bundled_pair[0]), answers)
    assert spread.shape == (256, 256)
    np.testing.assert_allclose(spread, spread.T, rtol=1e-3, atol=1e-4)
    assert np.linalg.eigvalsh(spread).min() > -1e-3


def test_a_narrow_head_drafts_nearly_as_well(
    bundled_pair: tuple[Any, Any], answers: list[Response], tmp_path: Path
) -> None:
    model, tokenizer = bundled_pair
    whole = mlx_distill.load_drafter(DRAFTER, model, tokenizer)
    narrow_head(DRAFTER, tmp_path / "narrow", 160, whole, Target.of(model), answers)
    narrow = mlx_distill.load_drafter(tmp_path / "narrow", model, tokenizer)
    assert narrow.config.head_rank == 160
    card = (tmp_path / "narrow" / "README.md").read_text()
    said = "Its head was made of two matrices with 160 numbers between them"
    assert card.endswith(f"\n\n{said}; what stands above was measured before that.\n")
    calls = []
    for drafter in (whole, narrow):
        found = mlx_distill.stream_generate(
            model, tokenizer, answers[0].prompt, drafter=drafter, max_tokens=40
        )
        last = list(found)
        assert [one.token for one in last] == answers[0].response
        calls.append(last[-1].target_calls)
    assert calls[1] <= 1.3 * calls[0]


def test_shares_are_of_what_can_be_drafted(bundled_pair: tuple[Any, Any]) -> None:
    drafter = mlx_distill.load_drafter(DRAFTER, *bundled_pair)
    ids = drafter.network.token_ids.tolist()
    first, second, *_ = ids
    unknown = min(set(range(4096)) - set(ids))
    answers = [Response([1], [first, first, unknown]), Response([1], [second, first])]
    shares = shares_of(drafter, answers)
    assert shares.sum() == pytest.approx(1)
    assert shares[:3].tolist() == pytest.approx([4 / 1540, 2 / 1540, 1 / 1540])


@pytest.mark.parametrize("rank", [0, 256, 1000])
def test_no_other_rank_is_taken(
    bundled_pair: tuple[Any, Any], answers: list[Response], tmp_path: Path, rank: int
) -> None:
    drafter = mlx_distill.load_drafter(DRAFTER, *bundled_pair)
    with pytest.raises(InputError, match=f"between 1 and 255, got {rank}"):
        narrow_head(DRAFTER, tmp_path / "n", rank, drafter, Target.of(bundled_pair[0]), answers)
    assert not (tmp_path / "n").exists()


def test_a_conversion_needs_something_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.npz"
    one = np.array([1])
    np.savez(path, prompt=one, answer=one, prompt_len=one, answer_len=one, greedy=one > 0)
    flags = ["--drafter", str(DRAFTER), "--output", str(tmp_path / "n"), "--answers", str(path)]
    assert convert.main(flags) == 2
    assert "name what is to change" in capsys.readouterr().err
