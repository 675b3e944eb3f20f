"""The gated delta rule over the nodes of a tree (Qwen3-Next, Kimi Linear and others).

The state S is a matrix from keys to values. Every token lets it fade, and then corrects what it
says of the token's key, by an update u:

    S_t = g_t S_(t-1) + u_t k_t'        u_t = b_t (v_t - g_t S_(t-1) k_t)        y_t = S_t q_t

With G_i, the product of g up to node i, and sums over its ancestors j, the state before the tree is
read once, and the updates solve a triangular system:

    u_i = b_i (v_i - G_i S k_i - sum over j above i of G_i / G_j (k_j . k_i) u_j)
    y_i = G_i S q_i + sum over j above i, or i, of G_i / G_j (k_j . q_i) u_j
    S_i = G_i S + sum over the same of G_i / G_j u_j k_j'

Source:
    Yang et al. 2024, arXiv:2412.06464; the triangular system: arXiv:2406.06484, section 3.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.gated_delta import compute_g, compute_lower_bound_g

from mlx_distill.target.recurrent.fading import between
from mlx_distill.target.tree_layout import TreeLayout

# Of a gate that closes, the logarithm is that of the smallest float32 that is not denormal.
CLOSED = 1.2e-38


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
) -> tuple[Float[mx.array, "1 N H E"], Callable[[int], mx.array]]:
    """Return the outputs at the nodes, and a function that returns the state at one of them.

    The arguments are those of mlx-lm's function. The gates are one per head, (1, N, H), or one per
    channel of the keys, (1, N, H, D).
    """
    if lower_bound is None:
        gates = compute_g(A_log, a, dt_bias)
    else:
        gates = compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    kind = _ByHead if gates.ndim == 3 else _ByChannel
    num, groups = layout.num_nodes, k.shape[2]
    if state is None:
        state = mx.zeros((1, v.shape[2], v.shape[3], k.shape[3]))
    before = state.reshape(groups, -1, *state.shape[2:])
    fading = kind(layout, _in_groups(gates.reshape(*v.shape[:3], -1), groups))
    strength = _in_groups(_strength(b, 2.0 if allow_neg_eigval else 1.0)[..., None], groups)
    # Queries and keys are asked for the same things: they go together.
    asked = _in_groups(mx.concatenate([q, k], axis=1).astype(mx.float32), groups)
    keys = asked[:, :, num:]
    pulls, links = fading.pulls(asked, keys)
    found, recalled = fading.recalled(asked, before)
    links = _links(layout.above, strength, links)
    known = _corrections(strength, _in_groups(v, groups), recalled)
    updates = known
    for _depth in range(layout.max_depth):
        updates = mx.addmm(known, links, updates)
    found = mx.addmm(found, pulls, updates).flatten(0, 1)

    def state_at(node: int) -> mx.array:
        kept, faded = fading.keys_at(keys, node)
        after = mx.addmm(before * faded, updates.swapaxes(-1, -2), kept)
        return after.reshape(state.shape).astype(state.dtype)

    return found.swapaxes(0, 1)[None].astype(q.dtype), state_at


class _ByHead:
    """Gates of one number per head: what they do can be done to the products."""

    def __init__(self, layout: TreeLayout, gates: Float[mx.array, "G R N 1"]):
        self.faded = layout.reach @ _logarithm(gates)
        self.decay = between(layout.mask, self.faded, self.faded.swapaxes(-1, -2))

    def pulls(self, asked: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
        """Return how much queries, and keys, have of the updates of each node."""
        of_queries, of_keys = mx.split(asked @ keys.swapaxes(-1, -2), 2, axis=2)
        return of_queries * self.decay, of_keys * self.decay

    def recalled(self, asked: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """Return what the state before the tree says of queries and keys."""
        of_queries, of_keys = mx.split(asked @ _numbers(state).swapaxes(-1, -2), 2, axis=2)
        return _faded(of_queries, self.faded), _faded(of_keys, self.faded)

    def keys_at(self, keys: mx.array, node: int) -> tuple[mx.array, mx.array]:
        """Return the keys that a node's state has, and how much is left of the one before."""
        rows = slice(node, node + 1)
        left = mx.exp(self.faded[:, :, rows])
        return keys * self.decay[:, :, rows].swapaxes(-1, -2), left


class _ByChannel:
    """Gates of one number per channel of a key: they fade the keys themselves."""

    def __init__(self, layout: TreeLayout, gates: Float[mx.array, "G R N D"]):
        self.faded = layout.reach @ _logarithm(gates)
        self.decay = between(
            layout.mask[..., None], self.faded[:, :, :, None], self.faded[:, :, None]
        )

    def pulls(self, asked: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
        """Return how much queries, and keys, have of the updates of each node."""
        faded = (keys[:, :, None] * self.decay).swapaxes(-1, -2)
        both = mx.stack([*mx.split(asked, 2, axis=2)], axis=3) @ faded  # a node's query and key
        return both[:, :, :, 0], both[:, :, :, 1]

    def recalled(self, asked: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """Return what the state before the tree says of queries and keys."""
        faded = _faded(asked, mx.concatenate([self.faded, self.faded], axis=2))
        of_queries, of_keys = mx.split(faded @ _numbers(state).swapaxes(-1, -2), 2, axis=2)
        return of_queries, of_keys

    def keys_at(self, keys: mx.array, node: int) -> tuple[mx.array, mx.array]:
        """Return the keys that a node's state has, and how much is left of the one before."""
        return keys * self.decay[:, :, node], mx.exp(self.faded[:, :, node : node + 1])


def _in_groups(x: Float[mx.array, "1 N H _"], groups: int) -> Float[mx.array, "G R N _"]:
    """Return the heads that share keys side by side, in front of the nodes."""
    return x.squeeze(0).reshape(x.shape[1], groups, -1, x.shape[-1]).transpose(1, 2, 0, 3)


def _numbers(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


@mx.compile
def _strength(b: mx.array, most: float) -> mx.array:
    return most * mx.sigmoid(_numbers(b))


@mx.compile
def _logarithm(gates: mx.array) -> mx.array:
    return mx.log(mx.maximum(_numbers(gates), CLOSED))


@mx.compile
def _faded(x: mx.array, faded: mx.array) -> mx.array:
    return x * mx.exp(faded)


@mx.compile
def _links(above: mx.array, strength: mx.array, pulls: mx.array) -> mx.array:
    return mx.where(above, -strength * pulls, 0)


@mx.compile
def _corrections(strength: mx.array, values: mx.array, recalled: mx.array) -> mx.array:
    return strength * (_numbers(values) - recalled)
