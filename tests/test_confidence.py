"""How sure a drafter may be: a fitted factor and its calibration error, against plain loops."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from scipy.special import log_softmax
from test_drafter_distillation import (
    TRIMMED,
    random_batch,
    random_drafter,
    starts_of,
    view_of,
)

from mlx_distill.distillation.confidence import CHOICES, calibration_error, fitted_confidence
from mlx_distill.distillation.drafter import unroll
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import DraftPlan


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_the_sharpness_makes_the_targets_best_tokens_likeliest(
    monkeypatch: pytest.MonkeyPatch, token_ids: list[int] | None, rows: int
) -> None:
    monkeypatch.setattr("mlx_distill.distillation.confidence.rows_at_once", lambda head: rows)
    drafter, starts = random_drafter(token_ids), starts_of(view_of(random_batch()))
    logits = np.array(drafter.head(unroll(drafter, starts)), np.float64)
    goals = 0.4 * logits + 0.5 * np.random.default_rng(2).normal(size=logits.shape)
    starts = starts._replace(goals=mx.array(goals))
    found = fitted_confidence(drafter, starts, lambda goals: goals)
    losses = dict.fromkeys(CHOICES, 0.0)
    paths: dict[float, list[tuple[float, bool]]] = {found.sharpness: [], 1.0: []}
    for place in range(len(logits)):
        sure, right = dict.fromkeys(paths, 0.0), True
        for depth in range(int(starts.mask[place].sum().item())):
            best = goals[place, depth].argmax()
            right = right and logits[place, depth].argmax() == best
            for choice in CHOICES:
                losses[choice] -= log_softmax(choice * logits[place, depth])[best]
            for choice, pairs in paths.items():
                sure[choice] += log_softmax(choice * logits[place, depth]).max()
                pairs.append((np.exp(sure[choice]), right))
    assert found.sharpness == min(losses, key=lambda choice: losses[choice])
    for choice, error in ((found.sharpness, found.error), (1.0, found.error_before)):
        bins: dict[int, list[float]] = {}
        for sure, right in paths[choice]:
            bins.setdefault(min(14, int(15 * sure)), []).append(sure - right)
        expected = sum(abs(sum(gaps)) for gaps in bins.values()) / len(paths[choice])
        assert error == pytest.approx(expected, abs=1e-4)


def test_the_error_of_what_is_calibrated_is_zero() -> None:
    sure = np.repeat([0.25, 0.75], 4)[None]
    right = np.array([[1, 0, 0, 0, 1, 1, 1, 0]], bool)
    assert calibration_error(sure, right, right | True) == 0
    assert calibration_error(sure, ~right, right | True) == 0.5
    assert calibration_error(sure, ~right, right & False) == 0


def test_paths_are_weighed_by_the_drafters_own_sharpness() -> None:
    drafter = random_drafter()
    embed, hidden, root = nn.Embedding(10, 5), mx.ones((5,)), mx.array([3])
    scores = []
    for sharpness in (1.0, 2.5):
        drafter.config = dataclasses.replace(drafter.config, sharpness=sharpness)
        draft = BoundDrafter(drafter, embed, {}).draft(hidden, root, DraftPlan(10, 1))
        scores.append(dict(zip(draft.tokens.tolist()[1:], draft.scores.tolist()[1:], strict=True)))
    tokens = sorted(scores[0])
    plain, sharp = (np.array([one[token] for token in tokens]) for one in scores)
    np.testing.assert_allclose(sharp, log_softmax(2.5 * plain), atol=1e-4)
