"""The state-space scan of Mamba-2 over the nodes of a tree (Falcon-H1, Nemotron-H and others).

    S_t = e^(dt_t A) S_(t-1) + dt_t x_t B_t'        y_t = S_t C_t + D x_t

With L_i, the sum of dt A up to node i, and a sum over its ancestors j and itself:

    y_i = e^(L_i) S C_i + sum of e^(L_i - L_j) (C_i . B_j) dt_j x_j + D x_i

Source:
    Dao and Gu 2024, arXiv:2405.21060, section 6: the masked form, here with a tree's mask.
"""

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.ssm import compute_dt

from mlx_distill.target.tree_layout import TreeLayout


def mamba2_on_tree(
    layout: TreeLayout,
    hidden_states: Float[mx.array, "1 N H P"],
    A_log: Float[mx.array, " H"],
    B: Float[mx.array, "1 N G S"],
    C: Float[mx.array, "1 N G S"],
    D: Float[mx.array, " H"],
    dt: Float[mx.array, "1 N H"],
    dt_bias: Float[mx.array, " H"],
    state: Float[mx.array, "1 H P S"] | None = None,
    time_step_limit: Sequence[float] = (0.001, 100.0),
    **_: object,
) -> Float[mx.array, "1 N H P"]:
    """Return the outputs at the nodes; the arguments are those of mlx-lm's function."""
    x = hidden_states[0].swapaxes(0, 1)
    steps = compute_dt(dt, dt_bias, time_step_limit)[0].T[..., None]  # (H, N, 1)
    faded = layout.mask.astype(mx.float32) @ (steps * -mx.exp(A_log)[:, None, None])
    between = mx.where(layout.mask, faded - faded.swapaxes(-1, -2), -mx.inf)
    repeats = x.shape[0] // B.shape[2]
    keys, queries = (mx.repeat(y[0].swapaxes(0, 1), repeats, axis=0) for y in (B, C))
    found = (queries @ keys.swapaxes(-1, -2) * mx.exp(between)) @ (steps * x)
    if state is not None:
        found = found + mx.exp(faded) * (queries @ state[0].swapaxes(-1, -2))
    found = found.astype(x.dtype) + x * D[:, None, None]
    return found.swapaxes(0, 1)[None]
