"""Exponentials of a call of several rows on a processor, as powers of two (``exponentials``).

Softmax and SwiGLU have most of them: half of what further rows add to a call of a small model.
Single rows are left as mlx-lm computes them, and so is everything where rows are to be exact:
results differ from those in the last places.
"""

from contextvars import ContextVar
from functools import partial

import mlx.core as mx
from jaxtyping import Bool, Float
from mlx import nn
from mlx_lm.models.activations import swiglu

from mlx_distill.kernels.exponentials import LOG2_E
from mlx_distill.target.teaching import teach

BARRED = -1e30  # of a score, before its power is 0
# Attention written out takes some operations more: with fewer weights that costs what powers save.
LEAST_WEIGHTS = 1 << 11

# Whether modules that are taught use them, in this thread.
in_use: ContextVar[bool] = ContextVar("powers_in_use", default=False)


def teach_gates(model: nn.Module) -> None:
    """Teach a model's gates to use powers where these are in use."""
    teach(model, swiglu, gate)


def gate(gates: mx.array, rows: mx.array) -> mx.array:
    """Return SiLU of the gates, times the rows: mlx-lm's function, or the same by powers."""
    if in_use.get() and gates.dtype == rows.dtype == mx.float32:
        return _gate(gates, rows)
    return swiglu(gates, rows)


@partial(mx.compile, shapeless=True)
def _gate(gates: mx.array, rows: mx.array) -> mx.array:
    return gates / (1 + mx.power(2.0, gates * -LOG2_E)) * rows


def takes(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> bool:
    """Return whether powers are in use, and worth it for such attention."""
    batch, heads, nodes, _ = queries.shape
    if not in_use.get() or batch != 1 or mask.ndim != 2:
        return False
    if heads * nodes * keys.shape[2] < LEAST_WEIGHTS:
        return False
    whole = queries.dtype == keys.dtype == values.dtype == mx.float32
    return whole and mask.dtype == mx.bool_


def attention(
    queries: Float[mx.array, "1 H N D"],
    keys: Float[mx.array, "1 G S D"],
    values: Float[mx.array, "1 G S V"],
    mask: Bool[mx.array, "N S"],
    scale: float,
) -> Float[mx.array, "1 H N V"]:
    """Return ``mx.fast.scaled_dot_product_attention``; heads of a group share a product."""
    _, heads, nodes, width = queries.shape
    groups, total = keys.shape[1:3]
    grouped = (scale * LOG2_E * queries).reshape(1, groups, -1, width)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(1, heads, nodes, total)
    scores = mx.where(mask, scores, BARRED)
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    seen = weights.reshape(1, groups, -1, total) @ values
    return seen.reshape(1, heads, nodes, -1) / weights.sum(axis=-1, keepdims=True)
