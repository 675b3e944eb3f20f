"""Slow NumPy twin of how logits become a distribution, one row at a time, in float64."""

import numpy as np


def sampling_law(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Return the probabilities that tokens are drawn with.

    The filters choose tokens by their probabilities at temperature 1: top-p, then min-p among what
    is left, then top-k among that. The temperature comes last.

    Args:
        logits: Any leading axes; the last one is the vocabulary. No two in a row may be equal.
        temperature: Above 0.
        top_p: Keep the smallest set of most probable tokens that holds at least this mass.
        top_k: Keep so many of the most probable tokens; 0 keeps all.
        min_p: Keep tokens at least this many times as probable as the best one.
    """
    logits = np.asarray(logits, np.float64)
    rows = logits.reshape(-1, logits.shape[-1])
    laws = [_row_law(row, temperature, top_p, top_k, min_p) for row in rows]
    return np.stack(laws).reshape(logits.shape)


def _row_law(
    logits: np.ndarray, temperature: float, top_p: float, top_k: int, min_p: float
) -> np.ndarray:
    probs = softmax(logits)
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    kept = [token for token in kept if probs[token] >= min_p * probs[ranked[0]]]
    if top_k:
        kept = kept[:top_k]
    law = np.zeros_like(probs)
    law[kept] = softmax(logits[kept] / temperature)
    return law


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of float64 logits, along the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
