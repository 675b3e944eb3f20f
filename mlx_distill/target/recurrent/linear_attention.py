"""Linear attention that fades at a fixed rate, over the nodes of a tree (Ling and Ring).

    S_t = e^g S_(t-1) + k_t v_t'        y_t = scale q_t S_t

With d_i, the depth of node i, and a sum over its ancestors j and itself:

    y_i = scale (e^(g (d_i + 1)) q_i S + sum of e^(g (d_i - d_j)) (q_i . k_j) v_j)

Source:
    Qin et al. 2024, arXiv:2401.04658, section 3.
"""

import mlx.core as mx
from jaxtyping import Float

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
) -> Float[mx.array, "1 H N E"]:
    """Return the outputs at the nodes; the arguments are those of mlx-lm's function."""
    depths, rates = layout.depths.astype(mx.float32), g[:, None, None]
    between = mx.where(layout.mask, depths[:, None] - depths[None], mx.inf)
    queries = scale * q
    found = (queries @ k.swapaxes(-1, -2) * mx.exp(rates * between)) @ v
    if h is not None:
        found = found + mx.exp(rates * (depths[:, None] + 1)) * (queries @ h)
    return found.astype(q.dtype)
