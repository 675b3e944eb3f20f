"""Batches of texts or examples: to learn from, by their number, and to judge by."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill.data.batches import batch_order
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation.distiller import Examples
from mlx_distill.distillation.on_policy import OnPolicyConfig, Rollouts
from mlx_distill.errors import InputError

Data = Sequence[Text] | Examples
JUDGED_BATCHES = 4  # so many batches are read at once where nothing is learned from them


def batch_of(data: Data, rows: Sequence[int], limit: int | None = None) -> Any:
    """Return some rows of the data as one batch; texts are not padded beyond ``limit``."""
    return data.take(rows) if isinstance(data, Examples) else text_batch(data, rows, limit=limit)


def slices(data: Data, batch_size: int, limit: int | None = None) -> Iterator[Any]:
    """Yield all of the data in batches of several times the size: nothing is learned from them.

    Texts are not padded beyond ``limit`` positions.
    """
    size = data.labels.size if isinstance(data, Examples) else len(data)
    order = list(range(size))
    if not isinstance(data, Examples):  # a teacher may know the texts by their rows: they stay
        order.sort(key=lambda row: len(data[row].tokens))
    at_once = JUDGED_BATCHES * batch_size
    for start in range(0, size, at_once):
        yield batch_of(data, order[start : start + at_once], limit)


def seeded(batch: Any, number: int, seed: int) -> Any:
    """Return the batch; what dropout draws from MLX's own generator depends on its number too."""
    mx.random.seed(int(np.random.default_rng([seed, 3, number]).integers(2**63)))
    return batch


def batches(
    student: nn.Module,
    data: Data,
    batch_size: int,
    on_policy: OnPolicyConfig | None,
    eos_token_ids: Sequence[int],
    folder: Path,
    augment: Callable[[Examples, int], Examples] | None,
    seed: int,
    limit: int | None,
    learned: int = 0,
) -> Callable[[int], Any]:
    """Return the training's batches as a function of their number, the first ``learned`` known.

    Raises:
        InputError: If there are none, or what a student wrote for later ones is not there any more.
    """
    drawing = on_policy is not None and on_policy.on_policy > 0
    if isinstance(data, Examples):
        if drawing:
            raise InputError("only language models can write what they learn from")
        size = data.labels.size

        order = batch_order([1] * size, batch_size, seed)

        def examples(number: int) -> Examples:
            batch = data.take(order(number))
            return augment(batch, number) if augment else batch

        return examples
    learnable = [row for row, text in enumerate(data) if text.num_learned]
    if not learnable and (on_policy is None or on_policy.on_policy < 1):
        raise InputError(
            "the texts are questions alone, from which nothing is learned; let the student write "
            "all of the batches, or give answers"
        )
    lengths = [len(data[row].tokens) for row in learnable]
    order = batch_order(lengths, batch_size, seed) if learnable else None

    def rows(number: int) -> list[int]:
        return [learnable[place] for place in order(number)] if order else []

    if on_policy is None or not drawing:
        return lambda number: text_batch(data, rows(number), limit=limit)
    return Rollouts(
        *(student, data, rows, batch_size, set(eos_token_ids), on_policy, folder, seed, limit),
        learned=learned,
    ).batch
