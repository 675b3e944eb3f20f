"""Logits become the distribution that mlx-lm's sampler draws from, and draws follow it."""

import gc
import math
from typing import Any

import mlx.core as mx
import mlx_lm.sample_utils
import numpy as np
import pytest
from oracles.sampling import sampling_law, softmax
from scipy.stats import chi2, kstest

from mlx_distill.arrays import log_probs
from mlx_distill.core.sampling import Sampling, TextNoise, sample, shaped_logits
from mlx_distill.errors import InputError

NUM = 200_000

SHAPINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.6, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 4},
    {"temperature": 1.2, "min_p": 0.02, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05, "top_k": 6},
]


def random_logits(*shape: int) -> np.ndarray:
    return 2 * np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def law(logits: np.ndarray, **shaping: Any) -> np.ndarray:
    """Return the distribution that a row of logits is drawn from."""
    return np.array(mx.softmax(shaped_logits(mx.array(logits), Sampling(**shaping)), axis=-1))


def mlx_lm_law(
    monkeypatch: pytest.MonkeyPatch, logits: np.ndarray, temperature: float, **filters: Any
) -> np.ndarray:
    """Return the distribution that mlx-lm's sampler draws from, by catching what it would draw."""

    def caught(logits: mx.array, temp: float) -> mx.array:
        return mx.softmax(logits / temp, axis=-1)

    monkeypatch.setattr(mlx_lm.sample_utils, "categorical_sampling", caught)
    sampler = mlx_lm.sample_utils.make_sampler(temperature, **filters)
    return np.array(sampler(log_probs(mx.array(logits))))


# The law


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_the_law_equals_the_slow_twin(shaping: dict[str, Any]):
    logits = random_logits(40, 12)
    np.testing.assert_allclose(law(logits, **shaping), sampling_law(logits, **shaping), atol=1e-6)


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_the_law_is_mlx_lms(shaping: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    logits = random_logits(40, 12)
    expected = mlx_lm_law(monkeypatch, logits, **shaping)
    np.testing.assert_allclose(law(logits, **shaping), expected, atol=1e-6)


def test_the_filters_look_at_temperature_one():
    # At temperature 0.1 the first token alone would hold more than 0.8.
    found = law(np.log([0.5, 0.4, 0.1]).astype(np.float32), temperature=0.1, top_p=0.8)
    weights = np.array([0.5**10, 0.4**10, 0])
    np.testing.assert_allclose(found, weights / weights.sum(), atol=1e-5)


def test_top_p_keeps_the_token_that_crosses_it():
    found = law(np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32), temperature=1.0, top_p=0.7)
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=1e-6)


def test_min_p_is_a_share_of_the_best():
    found = law(np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32), temperature=1.0, min_p=0.29)
    np.testing.assert_allclose(found, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=1e-6)


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
@pytest.mark.parametrize("constant", [-50.0, 7.0, 300.0])
def test_a_constant_added_to_logits_changes_nothing(shaping: dict[str, Any], constant: float):
    logits = random_logits(10, 12)
    shifted = law(logits + np.float32(constant), **shaping)
    np.testing.assert_allclose(shifted, law(logits, **shaping), atol=1e-4)


@pytest.mark.parametrize("top_k", [0, 12])
def test_as_many_tokens_as_there_are_is_no_filter(top_k: int):
    logits = random_logits(10, 12)
    expected = softmax(logits.astype(np.float64))
    np.testing.assert_allclose(law(logits, temperature=1.0, top_k=top_k), expected, atol=1e-6)


def test_leading_axes_are_independent_rows():
    logits = random_logits(4, 5, 12)
    shaping = {"temperature": 0.8, "top_p": 0.9, "top_k": 6}
    whole = law(logits, **shaping)
    for place in np.ndindex(4, 5):
        np.testing.assert_allclose(whole[place], law(logits[place], **shaping), atol=1e-7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_shaped_in_float32(dtype: mx.Dtype):
    logits = mx.array(random_logits(10, 12)).astype(dtype)
    shaping = {"temperature": 0.7, "top_p": 0.9}
    shaped = shaped_logits(logits, Sampling(**shaping))
    assert shaped.dtype == mx.float32
    expected = sampling_law(np.array(logits.astype(mx.float32)), **shaping)
    np.testing.assert_allclose(np.array(mx.softmax(shaped, axis=-1)), expected, atol=1e-6)


def test_log_probs_are_normalised():
    logits = 50 * random_logits(10, 12)
    expected = np.log(softmax(logits.astype(np.float64)))
    np.testing.assert_allclose(np.array(log_probs(mx.array(logits))), expected, atol=1e-4)
    assert log_probs(mx.array(logits).astype(mx.float16)).dtype == mx.float32


# Draws


def test_temperature_zero_takes_the_most_probable_token():
    logits = random_logits(6, 7, 12)
    # The other filters always keep the best token, so they change nothing.
    sampling = Sampling(temperature=0.0, top_p=0.5, top_k=3, min_p=0.3)
    for greedy in (Sampling(), sampling):
        np.testing.assert_array_equal(sample(mx.array(logits), greedy), logits.argmax(-1))


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_draws_follow_the_law(shaping: dict[str, Any]):
    logits = random_logits(6)
    rows = mx.broadcast_to(mx.array(logits), (NUM, 6))
    drawn = np.array(sample(rows, Sampling(**shaping), TextNoise(mx.random.key(3), 6).rows(0, NUM)))
    expected = sampling_law(logits, **shaping) * len(drawn)
    observed = np.bincount(drawn, minlength=6)
    kept = expected > 0
    assert observed[~kept].sum() == 0
    distance = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert kept.sum() == 1 or chi2.sf(distance, kept.sum() - 1) > 1e-3


# The noise of a text


def test_the_noise_is_gumbel_noise():
    rows = np.array(TextNoise(mx.random.key(8), 500).rows(0, 2000))
    assert kstest(rows.ravel()[::5], "gumbel_r").pvalue > 1e-3


def test_rows_are_independent():
    """Within a block and across the border of two."""
    noise = TextNoise(mx.random.key(2), 50_000)
    assert noise.block_rows < 20
    rows = np.array(noise.rows(0, 40))
    correlation = np.corrcoef(rows) - np.eye(40)
    assert np.abs(correlation).max() < 5 / np.sqrt(50_000)


@pytest.mark.parametrize("vocab_size", [7, 20_000])
def test_a_row_does_not_depend_on_what_was_asked_before(vocab_size: int):
    whole = np.array(TextNoise(mx.random.key(4), vocab_size).rows(0, 120))
    random = np.random.default_rng(0)
    for _ in range(5):
        noise, start = TextNoise(mx.random.key(4), vocab_size), 0
        while start < 100:
            count = int(random.integers(1, 20))
            np.testing.assert_array_equal(noise.rows(start, count), whole[start : start + count])
            start += int(random.integers(0, 40))


def test_rows_far_out_keep_no_rows_behind_them():
    gc.collect()
    empty = mx.get_active_memory()
    noise = TextNoise(mx.random.key(4), 50_000)
    mx.eval(noise.rows(0, 9))
    one = mx.get_active_memory() - empty
    for start in range(0, 2000, 7):
        mx.eval(noise.rows(start, 9))
        assert mx.get_active_memory() - empty < 2.5 * one  # rows of two blocks at the most
    assert len({row[0].item() for row in noise.rows(2000, 9)}) == 9


def test_a_key_repeats_its_noise_and_another_does_not():
    first, again, other = (
        TextNoise(mx.random.key(seed), 9).rows(0, 100).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_draws_do_not_touch_mlxs_own_random_state():
    mx.random.seed(0)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(0)
    sampling = Sampling(temperature=1.0, top_p=0.9, min_p=0.1, top_k=2)
    mx.eval(sample(mx.zeros((3, 5)), sampling, TextNoise(mx.random.key(1), 5).rows(0, 3)))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("temperature", -0.1, "temperature must be 0, or between 1e-6 and 100, got -0.1"),
        ("temperature", math.nan, "temperature must be a number, got nan"),
        ("temperature", math.inf, "temperature must be a number, got inf"),
        ("temperature", 1e-9, "temperature must be 0, or between 1e-6 and 100, got 1e-09"),
        ("temperature", 1e300, "temperature must be 0, or between 1e-6 and 100, got 1e[+]300"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
        ("top_p", 1.5, "top_p must be above 0 and at most 1, got 1.5"),
        ("top_p", math.nan, "top_p must be a number, got nan"),
        ("top_k", -1, "top_k must be at least 0, got -1"),
        ("min_p", -0.5, "min_p must be at least 0, got -0.5"),
        ("min_p", 1.01, "min_p must be between 0 and 1, got 1.01"),
        ("min_p", math.nan, "min_p must be a number, got nan"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float, sentence: str):
    with pytest.raises(InputError, match=f"^{sentence}$"):
        Sampling(**{field: value})


def test_the_borders_of_the_ranges_are_inside():
    Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    Sampling(temperature=1e-3, top_p=1e-3, top_k=1, min_p=1.0)


def test_more_tokens_than_there_are_are_refused():
    Sampling(top_k=12).check_vocabulary(12)
    sentence = "^top_k must be at most the vocabulary's 12 tokens, got 13$"
    with pytest.raises(InputError, match=sentence):
        Sampling(top_k=13).check_vocabulary(12)
