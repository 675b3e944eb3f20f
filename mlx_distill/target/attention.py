"""Attention of a tree's nodes, taken over from a model's attention modules during a call.

Modules that are taught (``teaching``) do what they did, but for the nodes of a tree they may attend
as was chosen (``kernels``, ``powers``), or, where rows are to be exact, node by node:

    cached keys   k k k k k        nodes  A B C D, B and C children of A, D a child of B
    A attends to  k k k k k A      D attends to  k k k k k A B D

Those are the keys that a step of plain decoding has, in its order and number, so each sum is made
of the same terms in the same order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_distill.kernels.choice import chosen
from mlx_distill.kernels.tree_attention import MOST_NODES, tree_attention
from mlx_distill.target import powers
from mlx_distill.target.batch.view import KeyRowsView
from mlx_distill.target.teaching import teach
from mlx_distill.target.tree_cache import TreeCache
from mlx_distill.target.tree_layout import TreeLayout

Attend: TypeAlias = Callable[..., mx.array]
# Keys or values; quantised ones are three arrays.
Kept: TypeAlias = mx.array | tuple[mx.array, ...] | list[mx.array]

_attend = cast(Attend, scaled_dot_product_attention)  # a mask may be a word, too


class NotExactError(Exception):
    """Attention that is not known to be the same for a row whatever goes with it."""


def wrap_attentions(model: nn.Module) -> None:
    """Teach every attention module of a model to take the nodes of a tree."""
    teach(model, scaled_dot_product_attention, attend_nodes)


def attend_nodes(
    queries: mx.array,
    keys: Kept,
    values: Kept,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return what mlx-lm's function does; of the nodes of a tree, in the way that was chosen."""
    if not isinstance(cache, TreeCache | KeyRowsView):
        return _attend(queries, keys, values, cache, scale, mask, sinks)
    attend = functools.partial(_attend, cache=cache, scale=scale, sinks=sinks)
    if isinstance(cache, KeyRowsView) and cache.layout.packing is not None:
        packing = cache.layout.packing
        return packing.line(attend(packing.rows(queries), keys, values, mask=mask))
    if not isinstance(cache, TreeCache) or cache.layout.num_nodes == 1:
        return attend(queries, keys, values, mask=mask)
    layout, plain = cache.layout, _is_plain(cache, mask)
    if layout.exact_paths:
        if not plain:
            raise NotExactError
        return _node_by_node(attend, queries, keys, values, layout, layout.exact_paths)
    few = sinks is None and not layout.batched and layout.num_nodes <= MOST_NODES
    if isinstance(keys, mx.array) and isinstance(values, mx.array) and isinstance(mask, mx.array):
        if plain and few and attends_by_kernel():
            return tree_attention(queries, keys, values, mask, layout.mask, scale)
        if sinks is None and powers.takes(queries, keys, values, mask):
            return powers.attention(queries, keys, values, mask, scale)
    return attend(queries, keys, values, mask=mask)


def attends_by_kernel() -> bool:
    """Return whether nodes attend by a kernel, so that a model's modules have to be taught."""
    return chosen(tree_attention.name)


def _is_plain(cache: TreeCache, mask: object) -> bool:
    """Return whether nodes attend to all that is cached, and to their ancestors."""
    whole = cache.layout.masks.get((cache.begin, None))
    return type(cache) is TreeCache and mask is not None and mask is whole


def _node_by_node(
    attend: Attend,
    queries: mx.array,
    keys: Kept,
    values: Kept,
    layout: TreeLayout,
    paths: Sequence[Sequence[int]],
) -> mx.array:
    """Return the attention of every node as that of a step, with its ancestors' keys alone."""
    rows = []
    for node, path in enumerate(paths):
        seen = functools.partial(_seen, num_nodes=layout.num_nodes, path=path)
        row = queries[:, :, node : node + 1]
        rows.append(attend(row, tree_map(seen, keys), tree_map(seen, values), mask=None))
    return mx.concatenate(rows, axis=2)


def _seen(x: mx.array, num_nodes: int, path: Sequence[int]) -> mx.array:
    """Return what is cached, and the nodes of a path behind it, of what ends with all nodes."""
    past = x.shape[-2] - num_nodes
    begin = next((place for place, node in enumerate(path) if node != place), len(path))
    parts = [x[..., : past + begin, :]]
    while begin < len(path):  # runs of nodes side by side are views
        node, end = path[begin], begin + 1
        while end < len(path) and path[end] == node + end - begin:
            end += 1
        parts.append(x[..., past + node : past + node + end - begin, :])
        begin = end
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)
