"""Slow NumPy twin of the recurrent drafter's network, one token and one layer at a time."""

from collections.abc import Sequence

import numpy as np

Parameters = dict[str, np.ndarray]


def slow_logits(
    parameters: Parameters,
    hidden: np.ndarray,
    embeddings: np.ndarray,
    rnn: bool = True,
    taps: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Return the logits of the next token after the drafter has read some.

    Args:
        parameters: By their names in a checkpoint.
        hidden: What the target's head saw when it chose the first token, (D,).
        embeddings: Of the tokens read, (T, E), oldest first.
        rnn: Without it the state is the sum of the embeddings.
        taps: What layers returned there, each (D,).
    """
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    hidden = np.asarray(hidden, np.float64)
    width = len(hidden)
    if taps:
        rows = [np.asarray(tap, np.float64) for tap in taps]
        normed = [row / np.sqrt(np.mean(row**2) + 1e-5) for row in rows]
        hidden = hidden + p["tap_proj.weight"] @ np.concatenate(normed)
    state = np.zeros(width)
    if "first_state.weight" in p:
        state = np.tanh(p["first_state.weight"] @ hidden + p["first_state.bias"])
    for embedding in np.asarray(embeddings, np.float64):
        if rnn:
            read = p["rnn_w.weight"] @ embedding
            recurrent = p["rnn_u.weight"] @ state + p["rnn_u.bias"]
            if len(read) == width:
                state = silu(read + recurrent)
                continue
            keep, reset = (
                1 / (1 + np.exp(-(read + recurrent)[part * width :][:width])) for part in (0, 1)
            )
            new = np.tanh(read[2 * width :] + reset * recurrent[2 * width :])
            state = (1 - keep) * new + keep * state
        else:
            state = state + embedding
    x = np.concatenate([hidden, state])
    if "input_proj.weight" in p:
        x = p["input_proj.weight"] @ x + p["input_proj.bias"]
    layer = 0
    while f"lm_head.{layer}.linear.weight" in p:
        block = f"lm_head.{layer}.linear"
        x = x + silu(p[f"{block}.weight"] @ x + p[f"{block}.bias"])
        layer += 1
    while f"lm_head.{layer}.weight" in p:
        x = p[f"lm_head.{layer}.weight"] @ x
        layer += 1
    return x


def silu(x: np.ndarray) -> np.ndarray:
    """Return x times its logistic function."""
    return x / (1 + np.exp(-x))
