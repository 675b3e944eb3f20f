"""Slow NumPy twin of beam search: every candidate of every level is scored and sorted."""

from collections.abc import Callable, Sequence

import numpy as np

Path = tuple[int, ...]


def slow_beam_search(
    log_probs: Callable[[Path], np.ndarray],
    width: int,
    length: int,
    token_ids: Sequence[int] | None = None,
) -> list[dict[Path, float]]:
    """Return, for every depth, the most probable paths there and their log-probabilities.

    Args:
        log_probs: Takes the tokens drafted so far, returns the log-probability of every next one.
        width: Paths kept at each depth; never more than there are tokens.
        length: Number of depths.
        token_ids: The tokens that the columns of ``log_probs`` stand for; None if the columns are
            the tokens.
    """
    levels: list[dict[Path, float]] = []
    kept: dict[Path, float] = {(): 0.0}
    for _ in range(length):
        candidates: dict[Path, float] = {}
        for path, score in kept.items():
            row = log_probs(path)
            tokens = range(len(row)) if token_ids is None else token_ids
            for token, step in zip(tokens, row, strict=True):
                candidates[(*path, int(token))] = score + float(step)
        ranked = sorted(candidates, key=lambda path: -candidates[path])
        kept = {path: candidates[path] for path in ranked[: min(width, len(row))]}
        levels.append(kept)
    return levels
