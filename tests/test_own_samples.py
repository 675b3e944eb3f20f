"""Drafts that go on with the drafter's own samples."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from oracles.sampling import softmax
from scipy.special import rel_entr
from test_drafter_distillation import (
    TRIMMED,
    UNROLL,
    head_of,
    random_batch,
    random_drafter,
    view_of,
)
from test_drafter_training import trainer_of

import mlx_distill
from mlx_distill.arrays import to_host
from mlx_distill.distillation import drafter as module
from mlx_distill.distillation.drafter import drafter_loss, unroll
from mlx_distill.distillation.own_samples import Own, columns_of
from mlx_distill.training.config import TrainingConfig


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float16"))


@pytest.mark.parametrize("rows", [1, 9, 10**6])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_a_draft_ends_where_a_sample_is_not_the_texts_token(
    monkeypatch: pytest.MonkeyPatch, token_ids: list[int] | None, rows: int
) -> None:
    """Against a loop, in float64; in chunks of any size."""
    monkeypatch.setattr(module, "rows_at_once", lambda head: rows)
    drafter, view = random_drafter(token_ids), view_of(random_batch())
    starts = view.starts(view.starting, UNROLL)
    student = softmax(np.array(drafter.head(unroll(drafter, starts)), np.float64))
    random = np.random.default_rng(3)
    columns = np.where(random.random(student.shape[:2]) < 0.2, -1, student.argmax(axis=-1))
    draws = random.random(columns.shape).astype(np.float32) ** 2
    starts = starts._replace(own=Own(mx.array(columns.astype(np.int32)), mx.array(draws)))
    target = softmax(np.array(head_of(token_ids)(starts.goals), np.float64))
    total = count = deepest = 0.0
    for start in range(len(student)):
        for depth in range(UNROLL):
            weight = starts.mask[start, depth].item() * 0.8**depth
            total += weight * rel_entr(target[start, depth], student[start, depth]).sum()
            count += weight
            column = columns[start, depth]
            if column < 0 or draws[start, depth] > student[start, depth, column]:
                break
            deepest = max(deepest, depth + 1)
    assert deepest == UNROLL
    found = drafter_loss(drafter, starts, head_of(token_ids))
    assert [x.item() for x in found] == pytest.approx([total, count], rel=1e-5)


def test_only_the_last_part_of_a_training_reads_samples(pair: tuple[Any, Any]) -> None:
    options = {"self_unroll": 0.3, "training": TrainingConfig(steps=10)}
    trainer = trainer_of(pair, [30] * 6, **options)
    drawn = []
    for step in range(10):
        starts = trainer.batch(step)
        assert starts.own is not None
        drawn.append(bool(mx.any(starts.own.draws > 0).item()))
        again = trainer.batch(step)
        assert again.own is not None
        assert mx.array_equal(starts.own.draws, again.own.draws).item()
    assert drawn == [False] * 7 + [True] * 3
    plain = trainer_of(pair, [30] * 6, training=TrainingConfig(steps=10))
    for step, same in ((2, True), (9, False)):
        values = [[x.item() for x in one.loss(one.batch(step))] for one in (trainer, plain)]
        assert (values[0] == pytest.approx(values[1], rel=1e-4)) == same


def test_the_token_that_the_target_chose_is_the_texts_next(pair: tuple[Any, Any]) -> None:
    trainer = trainer_of(pair, [40, 41, 42, 43, 44, 45])
    view = trainer.reader.view(trainer.training)
    texts = sorted(trainer.training, key=lambda text: len(text.tokens))
    tokens = [token for text in texts for token in text.tokens[1:-1]]
    places = view.starting[::7]
    chosen = view.chosen(places, 2)
    assert chosen.tolist() == [[tokens[p + 2], tokens[p + 3]] for p in to_host(places)]
    token_ids = trainer.network.token_ids
    ids, columns = np.array(token_ids), np.array(columns_of(token_ids, 4096)[chosen])
    np.testing.assert_array_equal(columns >= 0, np.isin(chosen, ids))
    np.testing.assert_array_equal(ids[columns[columns >= 0]], np.array(chosen)[columns >= 0])
    assert 0 < (columns >= 0).sum() < columns.size
