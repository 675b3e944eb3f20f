"""Slow NumPy twin of the recurrent drafter's network, one token and one layer at a time."""

import numpy as np

Parameters = dict[str, np.ndarray]


def slow_logits(
    parameters: Parameters, hidden: np.ndarray, embeddings: np.ndarray, rnn: bool = True
) -> np.ndarray:
    """Return the logits of the next token after the drafter has read some.

    Args:
        parameters: By their names in a checkpoint.
        hidden: What the target's head saw when it chose the first token, (D,).
        embeddings: Of the tokens read, (T, E), oldest first.
        rnn: Without it the state is the sum of the embeddings.
    """
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    state = np.zeros(len(hidden))
    for embedding in np.asarray(embeddings, np.float64):
        if rnn:
            read = p["rnn_w.weight"] @ embedding
            state = silu(read + p["rnn_u.weight"] @ state + p["rnn_u.bias"])
        else:
            state = state + embedding
    x = np.concatenate([np.asarray(hidden, np.float64), state])
    if "input_proj.weight" in p:
        x = p["input_proj.weight"] @ x + p["input_proj.bias"]
    layer = 0
    while f"lm_head.{layer}.linear.weight" in p:
        block = f"lm_head.{layer}.linear"
        x = x + silu(p[f"{block}.weight"] @ x + p[f"{block}.bias"])
        layer += 1
    return p[f"lm_head.{layer}.weight"] @ x


def silu(x: np.ndarray) -> np.ndarray:
    """Return x times its logistic function."""
    return x / (1 + np.exp(-x))
