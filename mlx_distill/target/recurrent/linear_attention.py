"""Linear attention that fades at a fixed rate, over the nodes of a tree (Ling and Ring).

    S_t = e^g S_(t-1) + k_t' v_t        y_t = scale q_t S_t

With n_i, the depth of node i and one more, and sums over its ancestors j and itself:

    y_i = scale (e^(g n_i) q_i S + sum of e^(g (n_i - n_j)) (q_i . k_j) v_j)
    S_i = e^(g n_i) S + sum of e^(g (n_i - n_j)) k_j' v_j

Source:
    Qin et al. 2024, arXiv:2401.04658, section 3.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.target.recurrent.fading import between
from mlx_distill.target.tree_layout import TreeLayout


def linear_attention_on_tree(
    layout: TreeLayout,
    q: Float[mx.array, "1 H N D"],
    k: Float[mx.array, "1 H N D"],
    v: Float[mx.array, "1 H N E"],
    g: Float[mx.array, " H"],
    scale: float,
    h: Float[mx.array, "1 H D E"] | None = None,
    **_: object,
) -> tuple[Float[mx.array, "1 H N E"], Callable[[int], mx.array]]:
    """Return the outputs at the nodes, and a function that returns the state at one of them.

    The arguments are those of mlx-lm's function.
    """
    before = mx.zeros((*k.shape[:2], k.shape[3], v.shape[3]), q.dtype) if h is None else h
    faded = g[:, None, None] * (layout.depths[:, None] + 1)  # (H, N, 1)
    decay = between(layout.mask, faded, faded.swapaxes(-1, -2))
    queries = scale * q
    found = ((queries @ k.swapaxes(-1, -2)) * decay) @ v + mx.exp(faded) * (queries @ before)

    def state_at(node: int) -> mx.array:
        kept = k * decay[:, node, :, None]
        left = before * mx.exp(faded[:, node, :, None])
        return (left + kept.swapaxes(-1, -2) @ v).astype(before.dtype)

    return found.astype(q.dtype), state_at
