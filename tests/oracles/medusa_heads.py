"""Slow NumPy twin of Medusa heads, one head and one layer at a time."""

from collections.abc import Sequence

import numpy as np
from oracles.recurrent_drafter import Parameters, silu


def slow_head_logits(
    parameters: Parameters, number: int, hidden: np.ndarray, taps: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Return the logits of one head.

    Args:
        parameters: By their names in a checkpoint.
        number: Of the head, from 0; it drafts the token so many behind the first drafted one.
        hidden: What the target's head saw when it chose the certain token, (D,).
        taps: What layers returned there, each (D,).
    """
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    x = np.asarray(hidden, np.float64)
    if taps:
        rows = [np.asarray(tap, np.float64) for tap in taps]
        normed = [row / np.sqrt(np.mean(row**2) + 1e-5) for row in rows]
        x = x + p["tap_proj.weight"] @ np.concatenate(normed)
    layer = 0
    while f"blocks.{number}.{layer}.linear.weight" in p:
        block = f"blocks.{number}.{layer}.linear"
        x = x + silu(p[f"{block}.weight"] @ x + p[f"{block}.bias"])
        layer += 1
    own = f"lm_head.{number}.weight"
    return p[own if own in p and "lm_head.1.weight" in p else "lm_head.0.weight"] @ x
