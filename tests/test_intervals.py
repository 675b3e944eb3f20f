"""Intervals of figures, and the share of a gap that is closed."""

import math

import numpy as np
import pytest

from mlx_distill.evaluation import metrics


def sums_of(nats: np.ndarray, tokens: int = 1) -> metrics.Sums:
    """Return the sums of texts whose tokens all have the same negative log-probability."""
    return {
        "tokens": np.full(len(nats), float(tokens)),
        "nats": nats * tokens,
        "bin_confidence": np.zeros((len(nats), 15)),
        "bin_right": np.zeros((len(nats), 15)),
    }


def test_intervals_repeat_with_their_seed_and_hold_the_figure() -> None:
    sums = {"m": sums_of(np.random.default_rng(0).normal(3, 1, 40))}
    one, same, other = (metrics.report(sums, seed=seed)["m"] for seed in (1, 1, 2))
    assert one == same
    assert one["nats_per_token"]["interval"] != other["nats_per_token"]["interval"]
    for key in ("nats_per_token", "perplexity"):
        low, high = one[key]["interval"]
        assert low < one[key]["value"] < high
    assert np.log(one["perplexity"]["interval"]) == pytest.approx(one["nats_per_token"]["interval"])


def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = random.normal(3, 1, 60)
        samples = metrics.resampled(values, 200, trial) / 60
        low, high = metrics.with_interval(values.mean(), samples)["interval"]
        covered += low <= 3 <= high
    # Binomial: 95 % less what a bootstrap of 60 texts lacks, 1.6 % standard deviation.
    assert 0.89 <= covered / 200 <= 0.985


def test_intervals_are_over_texts_and_not_tokens() -> None:
    nats = np.random.default_rng(0).normal(3, 1, 40)
    few, many = (metrics.report({"m": sums_of(nats, tokens)})["m"] for tokens in (1, 100))
    assert few["nats_per_token"]["interval"] == pytest.approx(many["nats_per_token"]["interval"])


def test_long_texts_weigh_more() -> None:
    sums = sums_of(np.array([1.0, 4.0]))
    sums["tokens"], sums["nats"] = np.array([30.0, 10.0]), np.array([30.0, 40.0])
    assert metrics.report({"m": sums})["m"]["nats_per_token"]["value"] == 70 / 40


@pytest.mark.parametrize(("num_texts", "num_samples"), [(1, 100), (5, 0)])
def test_no_intervals_without_samples(num_texts: int, num_samples: int) -> None:
    sums = {"m": sums_of(np.arange(1.0, num_texts + 1))}
    row = metrics.report(sums, num_samples=num_samples)["m"]
    assert row["perplexity"]["interval"] is None
    assert row["perplexity"]["value"] > 0


def test_share_of_the_gap() -> None:
    noise = np.random.default_rng(0).normal(3, 1, 40)
    sums = {
        "teacher": sums_of(noise),
        "plain": sums_of(noise + 0.4),
        "half": sums_of(noise + 0.2),
        "same": sums_of(noise),
        "worse": sums_of(noise + 0.8),
    }
    rows = metrics.report(sums, "teacher")
    shares = {name: row["gap_closed"] for name, row in rows.items() if name != "teacher"}
    assert "gap_closed" not in rows["teacher"]
    for name, share in {"plain": 0, "half": 0.5, "same": 1, "worse": -1}.items():
        assert shares[name]["value"] == pytest.approx(share)
        # The texts' noise is far larger than the gap; paired, it falls out.
        assert shares[name]["interval"] == pytest.approx([share, share])


def test_no_gap_has_no_share() -> None:
    noise = np.random.default_rng(0).normal(3, 1, 40)
    sums = {"teacher": sums_of(noise), "better": sums_of(noise - 1), "other": sums_of(noise + 1)}
    share = metrics.report(sums, "teacher")["other"]["gap_closed"]
    assert math.isnan(share["value"])
    assert share["interval"] is None
    assert "gap_closed" not in metrics.report({"teacher": sums["teacher"]}, "teacher")["teacher"]
