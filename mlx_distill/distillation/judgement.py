"""How good a student is on held-out data, while it learns."""

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import to_host, to_number
from mlx_distill.distillation.learned import learned_rows
from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.distillation.teachers import Answers, Teacher
from mlx_distill.evaluation.metrics import token_scores
from mlx_distill.losses.chunked import chunk_rows

JUDGED_BYTES = 2**25
# Names of the figures, and of the scores per label that they are the means of.
FIGURES = {"nats": "nats", "accuracy": "right", "kl": "kl", "agreement": "agree"}


def judge(
    answers: Answers, teacher: Teacher, batches: Iterable[Any], texts: bool = True
) -> dict[str, float]:
    """Return a network's held-out figures, means over labels.

    ``nats`` is the negative log-probability of the labels; of texts there is the ``perplexity``
    too, of classifiers the ``accuracy``. With a teacher's logits there is ``kl``,
    KL(teacher || network), and ``agreement``, of the best classes. The sums of a few rows at a time
    are added up in double precision.
    """
    sums: dict[str, float] = {}
    count = 0.0
    for batch in batches:
        hidden, _ = answers.read(batch.inputs)
        lesson = teacher.lesson(batch)
        flat = learned_rows(batch, hidden, *lesson.rows)
        size = judged_rows(answers.logits(flat[2][:1]).shape[-1])
        for start in range(0, flat[0].shape[0], size):
            labels, mask, here, *rows = (array[start : start + size] for array in flat)
            goal = lesson.spell(*rows) if rows else None
            theirs = goal.logits if goal is not None and goal.known is None else None
            found = _figures(answers.logits(here), labels, mask, theirs)
            if texts:
                found.pop("accuracy")
            for name, value in zip(found, to_host(mx.stack(list(found.values()))), strict=True):
                sums[name] = sums.get(name, 0.0) + value
            count += to_number(mask.sum())
    means = {name: value / (count or 1.0) for name, value in sums.items()}
    if texts:
        means["perplexity"] = math.exp(min(means["nats"], 700))  # beyond is no float
    return means


def judged_rows(num_entries: int) -> int:
    """Return how many rows of logits are there at once, where there are no gradients."""
    return chunk_rows(num_entries, JUDGED_BYTES)


def _figures(
    logits: mx.array, labels: mx.array, mask: mx.array, goal: mx.array | None
) -> dict[str, mx.array]:
    """Return the sums over rows; where the mask is 0, labels may be none, as -100."""
    scores = token_scores(logits, labels, goal)
    found = {name: scores[key] for name, key in FIGURES.items() if key in scores}
    return {name: weighted_sum(values.astype(mx.float32), mask) for name, values in found.items()}
