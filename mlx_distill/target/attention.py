"""Attention of a tree's nodes, taken over from a model's attention modules during a call.

mlx-lm's modules call the function ``scaled_dot_product_attention`` of their file. A module that is
taught here gets a class of its own, under the same name, that runs the very code of its former one
with another function under that name: it does what the former did, but for the nodes of a tree it
may attend as was chosen (``kernels``), or, where rows are to be exact, node by node:

    cached keys   k k k k k        nodes  A B C D, B and C children of A, D a child of B
    A attends to  k k k k k A      D attends to  k k k k k A B D

Those are the keys that a step of plain decoding has, in its order and number, so each sum is made
of the same terms in the same order.
"""

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TypeAlias, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_distill.kernels.choice import chosen
from mlx_distill.kernels.tree_attention import MOST_NODES, tree_attention
from mlx_distill.target.batch.view import KeyRowsView
from mlx_distill.target.tree_cache import TreeCache
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.watching import own_call

NAME = scaled_dot_product_attention.__name__
Attend: TypeAlias = Callable[..., mx.array]
# Keys or values; quantised ones are three arrays.
Kept: TypeAlias = mx.array | tuple[mx.array, ...] | list[mx.array]


class NotExactError(Exception):
    """Attention that is not known to be the same for a row whatever goes with it."""


def wrap_attentions(model: nn.Module) -> None:
    """Teach every attention module of a model to take the nodes of a tree.

    The modules stay where they are, with their parameters and their type.
    """
    for module in model.modules():
        kind = type(module)
        if not hasattr(kind, "attends_to_trees") and _calls_attention(kind):
            module.__class__ = _taught(kind)


def _calls_attention(kind: type[nn.Module]) -> bool:
    call = own_call(kind)
    if not isinstance(call, FunctionType) or NAME not in call.__code__.co_names:
        return False
    return call.__globals__.get(NAME) is scaled_dot_product_attention


@functools.cache
def _taught(kind: type[nn.Module]) -> type[nn.Module]:
    kind = getattr(kind, "watched_class", kind)
    call = own_call(kind)
    assert isinstance(call, FunctionType)
    names = {**call.__globals__, NAME: attend_nodes}
    own = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": own, "attends_to_trees": True})


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
    own = functools.partial(scaled_dot_product_attention, cache=cache, scale=scale, sinks=sinks)
    attend = cast(Attend, own)  # a mask may be a word, too
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
    if (
        plain
        and few
        and attends_by_kernel()
        and isinstance(keys, mx.array)
        and isinstance(values, mx.array)
        and isinstance(mask, mx.array)
    ):
        return tree_attention(queries, keys, values, mask, layout.mask, scale)
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
