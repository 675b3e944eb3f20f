"""The gated delta rule over the nodes of a tree (Qwen3-Next, Kimi Linear and others).

The state S is a matrix from keys to values. Every token lets it fade, and then corrects what it
says of the token's key, by an update u:

    S_t = g_t S_(t-1) + u_t k_t'        u_t = b_t (v_t - g_t S_(t-1) k_t)        y_t = S_t q_t

With G_i, the product of g up to node i, and sums over its ancestors j, the state before the tree is
read once, and the updates solve a triangular system:

    u_i = b_i (v_i - G_i S k_i - sum over j above i of G_i / G_j (k_j . k_i) u_j)
    y_i = G_i S q_i + sum over j above i, or i, of G_i / G_j (k_j . q_i) u_j

Source:
    Yang et al. 2024, arXiv:2412.06464; the triangular system: arXiv:2406.06484, section 3.
"""

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.gated_delta import compute_g, compute_lower_bound_g

from mlx_distill.target.tree_layout import TreeLayout

# Of a gate that closes, the logarithm is this: e^-87 is the smallest float32 that is not denormal.
CLOSED = 1e-38


def gated_delta_on_tree(
    layout: TreeLayout,
    q: Float[mx.array, "1 N G D"],
    k: Float[mx.array, "1 N G D"],
    v: Float[mx.array, "1 N H E"],
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: Float[mx.array, "1 H E D"] | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    **_: object,
) -> Float[mx.array, "1 N H E"]:
    """Return the outputs at the nodes; the arguments are those of mlx-lm's function.

    The gates are one per head, (1, N, H), or one per channel of the keys, (1, N, H, D).
    """
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if lower_bound is None:
        gates = compute_g(A_log, a, dt_bias)
    else:
        gates = compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    repeats = v.shape[2] // k.shape[2]
    queries, keys, values = (_by_head(x, n) for x, n in ((q, repeats), (k, repeats), (v, 1)))
    fading = mx.log(mx.maximum(_by_head(gates if gates.ndim == 4 else gates[..., None], 1), CLOSED))
    faded = layout.mask.astype(mx.float32) @ fading  # log G, (H, N, 1 or D)
    strength = _by_head(beta[..., None], 1)
    pulls = _pulls(layout, queries, keys, faded)
    above = layout.mask & ~mx.eye(layout.num_nodes, dtype=mx.bool_)
    links = mx.where(above, -strength * _pulls(layout, keys, keys, faded), 0)
    updates = strength * (values - _recalled(state, keys, faded))
    known = updates
    for _depth in range(layout.max_depth):
        updates = known + links @ updates
    found = _recalled(state, queries, faded) + pulls @ updates
    return found.swapaxes(0, 1)[None].astype(q.dtype)


def _by_head(x: mx.array, repeats: int) -> Float[mx.array, "H N _"]:
    """Return heads in front of nodes, in float32, each so many times."""
    x = x[0].swapaxes(0, 1).astype(mx.float32)
    return x if repeats == 1 else mx.repeat(x, repeats, axis=0)


def _recalled(state: mx.array | None, keys: mx.array, faded: mx.array) -> mx.array:
    """Return what the state before the tree says of keys at each node, (H, N, E)."""
    if state is None:
        return mx.array(0.0)
    return (keys * mx.exp(faded)) @ state[0].astype(mx.float32).swapaxes(-1, -2)


def _pulls(layout: TreeLayout, x: mx.array, keys: mx.array, faded: mx.array) -> mx.array:
    """Return how much every node has of the updates of those on its path, (H, N, N)."""
    if faded.shape[-1] == 1:
        between = faded - faded.swapaxes(-1, -2)
        return x @ keys.swapaxes(-1, -2) * mx.exp(mx.where(layout.mask, between, -mx.inf))
    between = mx.where(layout.mask[..., None], faded[:, :, None] - faded[:, None], -mx.inf)
    return (x[:, :, None] * keys[:, None] * mx.exp(between)).sum(axis=-1)
