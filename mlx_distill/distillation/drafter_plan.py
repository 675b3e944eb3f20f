"""What a training of a drafter is going to do, and how long an epoch takes, before it begins."""

import time
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.utils import value_and_grad

from mlx_distill.distillation.drafter_trainer import DrafterTrainer
from mlx_distill.distillation.feature_store import stored_row_bytes

MEASURED_STARTS = 512  # drafts of a step that is timed; on a CPU more take longer, not less each


class EpochTime(NamedTuple):
    """How long an epoch takes.

    Args:
        reading_s: For the target to read all answers.
        learning_s: For the drafter to learn from what it read.
    """

    reading_s: float
    learning_s: float


def measured_epoch(trainer: DrafterTrainer) -> EpochTime:
    """Return how long an epoch is going to take, from a batch of answers and two steps."""
    group, size = trainer.groups[0], trainer.config.batch_size
    first = max(0, (len(group) - size) // 2)  # the shortest stand first, and take less per token
    texts = group[first : first + size]
    start = time.perf_counter()
    view = trainer.reader.view(texts)
    share = sum(len(text.tokens) for text in texts) / sum(
        len(text.tokens) for group in trainer.groups for text in group
    )
    reading_s = (time.perf_counter() - start) / share
    count = min(trainer.config.starts, MEASURED_STARTS)
    rows, spread = view.starting, max(1, trainer.spread)
    places = rows[mx.array(spread * np.arange(count) % rows.size)]
    starts = view.starts(places, trainer.config.unroll, trainer.config.look_back)
    step = value_and_grad(trainer.network, lambda: trainer.loss(starts)[0])
    mx.eval(step())  # also builds what all of them need
    start = time.perf_counter()
    mx.eval(step())
    step_s = time.perf_counter() - start
    return EpochTime(reading_s, step_s * trainer.order.starts_per_epoch / count)


def plan(trainer: DrafterTrainer) -> str:
    """Return what is going to be learned, and how long that takes, in a few sentences."""
    counts, order, settings = trainer.counts(), trainer.order, trainer.settings
    size = trainer.num_rows * trainer.reader.row_bytes
    epochs = settings.steps / order.steps_per_epoch
    draftable = len(trainer.network.get("token_ids", ())) or "all"
    return (
        f"{counts['answers']:,} answers, {counts['tokens']:,} tokens; what the target computes of "
        f"them is {size / 1e9:.2f} GB{_on_disk(trainer)}, in {len(order.groups)} parts; "
        f"{settings.steps:,} steps are {epochs:.1f} epochs; {draftable} tokens can be drafted, "
        f"{100 * trainer.coverage:.2f} % of what was written{_unjudged(trainer)}\n"
        f"{_duration(trainer, epochs)}"
    )


def _unjudged(trainer: DrafterTrainer) -> str:
    """Return what held-out answers are too short to judge, as a line."""
    reached, length = trainer.judged_depth, trainer.config.unroll
    if reached == length:
        return ""
    if not reached:
        return "\nno held-out answer has two tokens: nothing judges the drafter"
    return f"\nno held-out answer reaches beyond the first {reached} of {length} drafted tokens"


def _on_disk(trainer: DrafterTrainer) -> str:
    if trainer.store is None:
        return ""
    row_bytes = stored_row_bytes(trainer.reader)
    whole = trainer.num_rows * row_bytes / 1e9
    missing = trainer.store.num_missing * row_bytes / 1e9
    return f" ({whole:.2f} GB on disk, of which {missing:.2f} GB are not there yet)"


def _duration(trainer: DrafterTrainer, epochs: float) -> str:
    reading_s, learning_s = measured_epoch(trainer)
    readings = max(1.0, epochs)
    if trainer.store is not None:
        readings = trainer.store.num_missing / max(1, trainer.num_rows)
    elif len(trainer.order.groups) == 1:
        readings = 1.0
    total_s = readings * reading_s + epochs * learning_s
    if trainer.settings.max_minutes is not None:
        total_s = min(total_s, 60 * trainer.settings.max_minutes)
    return (
        f"an epoch takes about {_words(learning_s)}, and {_words(reading_s)} more where the target "
        f"reads the answers; all of it about {_words(total_s)}"
    )


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
