"""What models make of held-out texts, as sums per text.

All models read the same batches. Of a batch only the learned positions are taken behind the body,
and their logits exist for some rows at a time: the teacher's serve all students::

    texts -> batch -> hidden (N, D) of every model -> logits (rows, V) -> scores (N,) -> sums
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Int
from mlx import nn
from tqdm import tqdm

from mlx_distill.data.texts import Text, TextBatch, text_batch
from mlx_distill.distillation.teachers import Answers
from mlx_distill.errors import InputError
from mlx_distill.evaluation.metrics import Sums, text_sums, token_scores
from mlx_distill.target.reading import vocab_width

CHUNK_BYTES = 2**25  # of one model's logits in float32; a score holds a few arrays of that size


def evaluate(
    models: dict[str, nn.Module],
    texts: Sequence[Text],
    teacher: str | None = None,
    batch_size: int = 8,
) -> dict[str, Sums]:
    """Return every model's sums per text, for ``report``: arrays whose first axis is the texts.

    They are ``tokens``, ``nats``, ``bin_confidence`` and ``bin_right`` (see ``text_sums``), and for
    models other than the teacher ``kl`` and ``agree`` with it. Vocabularies of different widths are
    cut to the narrowest before the softmax.

    Args:
        models: By name.
        texts: Those that have something to predict.
        teacher: Which of the models the others are compared with.
        batch_size: Texts read at once.

    Raises:
        InputError: If a text has tokens that a model does not know, or logits are not numbers.
    """
    if teacher is not None and teacher not in models:
        raise InputError(f"teacher must be one of {', '.join(models)}, got {teacher}")
    widths = vocabulary_widths(models)
    width = min(widths.values())
    _check_tokens(texts, width)
    names = sorted(models, key=lambda name: name != teacher)  # the teacher comes first
    answers = {name: Answers(models[name], texts=True) for name in names}
    found: dict[str, list[Sums]] = {name: [{}] * len(texts) for name in names}
    # Texts of similar length come together, so little is padded, and nothing beyond the longest:
    # that could be beyond a model's last position.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row].tokens))
    # Where a model makes its logits itself, they are there for the whole batch: one text, then.
    size = batch_size if all(one.body for one in answers.values()) else 1
    for start in tqdm(range(0, len(texts), size), desc="evaluate", unit="batch", leave=False):
        batch = text_batch(texts, order[start : start + size], multiple=1)
        scores = _batch_scores(answers, batch, teacher, width)
        ends = np.cumsum(np.array(batch.mask.sum(axis=1)).astype(int))[:-1]
        for name, kept in scores.items():
            parts = {key: np.split(values, ends) for key, values in kept.items()}
            for place, row in enumerate(batch.rows):
                found[name][row] = text_sums({key: part[place] for key, part in parts.items()})
    return {
        name: {key: np.stack([sums[key] for sums in found[name]]) for key in found[name][0]}
        for name in models
    }


def vocabulary_widths(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return how many logits each model gives."""
    return {name: vocab_width(model) for name, model in models.items()}


def _check_tokens(texts: Sequence[Text], width: int) -> None:
    largest = max(max(text.tokens) for text in texts)
    smallest = min(min(text.tokens) for text in texts)
    if largest >= width:
        raise InputError(f"the texts hold token {largest}, a model's vocabulary ends at {width}")
    if smallest < 0:
        raise InputError(f"the texts hold token {smallest}; mark what is not learned instead")


def _batch_scores(
    answers: dict[str, Answers], batch: TextBatch, teacher: str | None, width: int
) -> dict[str, Sums]:
    """Return every model's scores of a batch's learned tokens, text by text."""
    places = mx.array(np.flatnonzero(np.array(batch.mask)))
    labels = batch.labels.reshape(-1)[places]
    hidden = {name: _rows_at(one.read(batch.inputs)[0], places) for name, one in answers.items()}
    rows = max(1, CHUNK_BYTES // (4 * width))
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in answers}
    for start in range(0, places.size, rows):
        here = slice(start, start + rows)
        theirs = None
        for name, one in answers.items():
            logits = one.logits(hidden[name][here])[..., :width]
            scores = token_scores(logits, labels[here], theirs)
            mx.eval(scores)  # one model after the other, to hold fewer vocabularies
            parts[name].append({key: np.array(value) for key, value in scores.items()})
            if name == teacher:
                theirs = logits
            if np.isnan(parts[name][-1]["nats"]).any():
                raise InputError(
                    f"the logits of {name} are not numbers; its weights are damaged, or its "
                    "precision is too low"
                )
    return {
        name: {key: np.concatenate([part[key] for part in some]) for key in some[0]}
        for name, some in parts.items()
    }


def _rows_at(hidden: mx.array, places: Int[mx.array, " N"]) -> mx.array:
    rows = hidden.reshape(-1, hidden.shape[-1])[places]
    mx.eval(rows)
    return rows
