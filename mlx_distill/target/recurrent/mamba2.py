"""The state-space scan of Mamba-2 over the nodes of a tree (Falcon-H1, Nemotron-H and others).

    S_t = e^(dt_t A) S_(t-1) + dt_t x_t B_t'        y_t = S_t C_t + D x_t

With L_i, the sum of dt A up to node i, and sums over its ancestors j and itself:

    y_i = e^(L_i) S C_i + sum of e^(L_i - L_j) (C_i . B_j) dt_j x_j + D x_i
    S_i = e^(L_i) S + sum of e^(L_i - L_j) dt_j x_j B_j'

Source:
    Dao and Gu 2024, arXiv:2405.21060, section 6: the masked form, here with a tree's mask.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.ssm import compute_dt

from mlx_distill.target.recurrent.fading import between
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
) -> tuple[Float[mx.array, "1 N H P"], Callable[[int], mx.array]]:
    """Return the outputs at the nodes, and a function that returns the state at one of them.

    The arguments are those of mlx-lm's function.
    """
    groups, shape = B.shape[2], (1, *hidden_states.shape[2:], B.shape[3])
    steps = compute_dt(dt, dt_bias, time_step_limit)
    x, steps, rates, skips = (
        y.reshape(-1, groups, hidden_states.shape[2] // groups, y.shape[-1]).transpose(1, 2, 0, 3)
        for y in (hidden_states.squeeze(0), steps[0, ..., None], A_log[:, None], D[:, None])
    )
    keys, queries = (
        y.squeeze(0).swapaxes(0, 1)[:, None] for y in (B, C)
    )  # heads of a group share them
    faded = layout.reach @ _fading(steps, rates)  # L, (G, R, N, 1)
    decay = between(layout.mask, faded, faded.swapaxes(-1, -2))
    added = steps * x
    found = ((queries @ keys.swapaxes(-1, -2)) * decay) @ added
    before = mx.zeros(shape) if state is None else state
    before = before.reshape(groups, -1, *shape[2:])
    found = _outputs(found, faded, queries @ before.swapaxes(-1, -2), x, skips).flatten(0, 1)

    def state_at(node: int) -> mx.array:
        rows = slice(node, node + 1)
        kept = added * decay[:, :, rows].swapaxes(-1, -2)
        left = before * mx.exp(faded[:, :, rows])
        after = mx.addmm(left, kept.swapaxes(-1, -2), keys.astype(kept.dtype)).reshape(shape)
        return after if state is None else after.astype(state.dtype)

    return found.swapaxes(0, 1)[None].astype(hidden_states.dtype), state_at


@mx.compile
def _fading(steps: mx.array, rates: mx.array) -> mx.array:
    return -steps * mx.exp(rates).astype(steps.dtype)


@mx.compile
def _outputs(
    found: mx.array, faded: mx.array, recalled: mx.array, x: mx.array, skips: mx.array
) -> mx.array:
    return found + mx.exp(faded) * recalled + x * skips
