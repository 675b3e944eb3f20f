"""Answers of the target as padded batches, in an order that only the seed decides."""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_distill.data.responses import Response


def padded_batch(responses: Sequence[Response], width: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return texts (B, width), prompt lengths (B,) and text lengths (B,); longer texts are cut."""
    texts = np.zeros((len(responses), width), np.int32)
    lengths = []
    for row, response in zip(texts, responses, strict=True):
        text = (response.prompt + response.response)[:width]
        row[: len(text)] = text
        lengths.append(len(text))
    prompts = [len(response.prompt) for response in responses]
    return mx.array(texts), mx.array(prompts), mx.array(lengths)


def shuffled_rows(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the rows of a step's batch; every epoch is a new order, and no row is left out."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = [
        np.random.default_rng([seed, epoch]).permutation(num_rows)[
            places[places // num_rows == epoch] % num_rows
        ]
        for epoch in sorted(set((places // num_rows).tolist()))
    ]
    return np.concatenate(rows)


def frequent_tokens(responses: Sequence[Response], count: int, vocab_size: int) -> list[int]:
    """Return the ``count`` tokens that the answers use most, in ascending order.

    Tokens that were never used fill up what is missing, smallest id first.
    """
    used = Counter(token for response in responses for token in response.response)
    ranked = sorted(range(vocab_size), key=lambda token: (-used[token], token))
    return sorted(ranked[:count])
