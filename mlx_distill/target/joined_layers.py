"""Layers of few rows with their operations joined: eight dispatches where MLX's are seventeen.

    norm, queries, keys and values | rope of both | two writes to the cache | attention
    product and sum | norm, gate and up | product and sum

Which layers can be made so is told by their code: mlx-lm's llama has it, and with norms of the
heads qwen3, and so have other models whose files say the same. During a tree's call, and where all
of these kernels were chosen, such a layer is made here; other layers and calls stay as they are.
"""

from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx_lm.models import llama, qwen3

from mlx_distill.kernels.choice import chosen
from mlx_distill.kernels.layer_products import added, gated, joined
from mlx_distill.kernels.product_source import MOST_ROWS, Norm
from mlx_distill.kernels.tree_turns import tree_turns
from mlx_distill.target import powers
from mlx_distill.target.attention import attend_nodes
from mlx_distill.target.products import matrix_of
from mlx_distill.target.tree_cache import TreeCache
from mlx_distill.target.tree_rope import turning_of
from mlx_distill.target.watching import Call, Heard, own_call

OPERATIONS = (joined, tree_turns, added, gated)
NAMES = frozenset(operation.name for operation in OPERATIONS)


def layers_chosen() -> bool:
    """Return whether layers are made of the kernels that are theirs."""
    return all(map(chosen, NAMES))


class JoinedLayers:
    """The layers of a model that can be made so.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._heard = [
            Heard(layer, partial(_of_nodes, layer)) for layer in model.modules() if _is_known(layer)
        ]

    def of_few_rows(self) -> Sequence[Heard]:
        """Return what has to be heard so that the layers are made so of the nodes of a tree."""
        return self._heard


def _is_known(layer: Any) -> bool:
    """Return whether a module is a layer whose code, and whose parts' code, is known here."""
    if not _says(layer, llama.TransformerBlock) or not _says(layer.mlp, llama.MLP):
        return False
    attention, norms = layer.self_attn, [layer.input_layernorm, layer.post_attention_layernorm]
    if _says(attention, qwen3.Attention):
        norms += [attention.q_norm, attention.k_norm]
    elif not _says(attention, llama.Attention):
        return False
    return all(_says(norm, nn.RMSNorm) for norm in norms)


def _says(module: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether calling a module runs the very code of a class that is known."""
    own, other = own_call(type(module)), own_call(known)
    if not isinstance(own, FunctionType) or not isinstance(other, FunctionType):
        return False
    one, two = own.__code__, other.__code__
    if one.co_code != two.co_code or one.co_names != two.co_names or one.co_consts != two.co_consts:
        return False
    names = [name for name in two.co_names if name in other.__globals__]
    # Attention may have been taught to take nodes, and gates to use powers.
    means, taught = own.__globals__.get, (attend_nodes, powers.gate)
    return all(means(name) in (other.__globals__[name], *taught) for name in names)


def _of_nodes(
    layer: Any, call: Call, x: Float[mx.array, "1 N D"], mask: Any = None, cache: Any = None
) -> Float[mx.array, "1 N D"]:
    """Return what a layer makes of the nodes of a tree; by its own code where they are no few."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [mlp[name] for name in ("gate_proj", "up_proj", "down_proj")]
    matrices = [matrix for linear in linears if (matrix := matrix_of(linear)) is not None]
    if len(matrices) < len(linears) or not _are_few_nodes(x, cache):
        return call(x, mask, cache=cache)
    *into, back, gate, up, down = matrices
    heads = attention.n_heads, attention.n_kv_heads, attention.n_kv_heads
    width = into[1].weight.shape[0] // attention.n_kv_heads
    turning = turning_of(attention.rope, cache.offset, width)
    if turning is None:
        return call(x, mask, cache=cache)
    nodes = x.squeeze(0)  # an index would be a gather
    products = joined(nodes, _norm(layer.input_layernorm), tuple(into))
    queries, keys, values = (
        rows.reshape(1, -1, count, width).swapaxes(1, 2)
        for rows, count in zip(products, heads, strict=True)
    )
    queries, keys = tree_turns(queries, keys, *turning, _of_heads(attention))
    keys, values = cache.update_and_fetch(keys, values)
    seen = attend_nodes(queries, keys, values, cache=cache, scale=attention.scale, mask=mask)
    rows = added(seen.swapaxes(1, 2).reshape(x.shape[1], -1), back, nodes)
    inner = gated(rows, _norm(layer.post_attention_layernorm), gate, up)
    return added(inner, down, rows)[None]


def _are_few_nodes(x: mx.array, cache: object) -> bool:
    """Return whether rows are the nodes of one tree, which need not be exact to the last bit."""
    if not isinstance(cache, TreeCache):
        return False
    layout = cache.layout
    few = 1 < layout.num_nodes <= MOST_ROWS and x.shape[:2] == (1, layout.num_nodes)
    return few and not layout.batched and not layout.exact_paths


def _of_heads(attention: Any) -> tuple[Norm, Norm] | None:
    if "q_norm" not in attention:
        return None
    return _norm(attention.q_norm), _norm(attention.k_norm)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.eps)
