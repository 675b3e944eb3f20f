"""Whether a model takes several texts in one call is found by trying, once, and how.

Two texts of different lengths are read alone and together: in a line, and with trees. What each
says together has to be what it says alone, and far from what the other says. If it is given the
nodes of the trees as one list, it has to say the same of them.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_distill.core.forest import Forest, Packing
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.batch.call import call_on_forest, call_on_tokens
from mlx_distill.target.batch.key_rows import KeyRows
from mlx_distill.target.batch.rows import Rows, kind_of
from mlx_distill.target.head import Head
from mlx_distill.target.opening import FLOOR, ROOM, rms_difference
from mlx_distill.target.tree_call import call_on_text

# What the texts say before their trees, in shares of the vocabulary; see ``opening``.
_TEXTS = ((0.13, 0.48), (0.74, 0.22, 0.83, 0.09, 0.57))
_NODES = ((0.39, 0.22, 0.61, 0.04), (0.17, 0.70, 0.52))
_PARENTS = ((0, 0, 0, 1), (0, 0, 0))


def takes_batches(model: nn.Module, head: Head) -> bool:
    """Return whether a model takes the trees of several texts in one call; it is tried once."""
    return _found(model, head, "_mlx_distill_batches", _agrees)


def packs(model: nn.Module, head: Head, rows: Rows) -> bool:
    """Return whether a model takes the nodes of several trees as one list; it is tried once.

    Recurrent layers do not, and of the others those whose attention can be taken over.

    Args:
        model: The model, which takes batches.
        head: Where its hidden states are.
        rows: Of any texts of it.
    """
    if not all(isinstance(layer, KeyRows) for layer in rows.layers):
        return False
    return _found(model, head, "_mlx_distill_packs", _packs)


def _found(
    model: nn.Module, head: Head, name: str, tried: Callable[[nn.Module, Head], bool]
) -> bool:
    """Return what a model was found to do, which it remembers by a name."""
    known = model.__dict__.get(name)
    if known is None:
        try:
            known = tried(model, head)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            known = False
        object.__setattr__(model, name, known)
    return known


def _packs(model: nn.Module, head: Head) -> bool:
    caches = [make_prompt_cache(model) for _ in _TEXTS]
    size = call_on_text(model, head, mx.array([1]), make_prompt_cache(model)).logits.shape[-1]
    texts = _tokens(_TEXTS, size)
    for text, cache in zip(texts, caches, strict=True):
        mx.eval(call_on_text(model, head, mx.array(text), cache))
    rows, more = (Rows.of(c, len(text)) for c, text in zip(caches, texts, strict=True))
    rows.join(more)
    forest = Forest.of(_trees(size))
    packing = Packing(tuple(tree.tokens.size for tree in forest.trees))
    right = packing.packed(call_on_forest(model, head, forest, rows).logits)
    found = call_on_forest(model, head, forest, rows, packing=packing).logits
    error, other = (rms_difference(x.flatten(), right.flatten()) for x in (found, right[::-1]))
    return error <= FLOOR.get(right.dtype, 0.3) and ROOM * error <= other


def _trees(size: int) -> list[PrefixTree]:
    return [
        PrefixTree.from_parents(mx.array(tokens), mx.array(parents), 2)
        for tokens, parents in zip(_tokens(_NODES, size), _PARENTS, strict=True)
    ]


def _agrees(model: nn.Module, head: Head) -> bool:
    caches = [make_prompt_cache(model) for _ in _TEXTS]
    if kind_of(caches[0]) is None:
        return False
    size = call_on_text(model, head, mx.array([1]), make_prompt_cache(model)).logits.shape[-1]
    texts, nodes = (_tokens(shares, size) for shares in (_TEXTS, _NODES))
    for text, cache in zip(texts, caches, strict=True):
        mx.eval(call_on_text(model, head, mx.array(text[:-1]), cache))
    rows, more = (Rows.of(c, len(text) - 1) for c, text in zip(caches, texts, strict=True))
    rows.join(more)
    found = call_on_tokens(model, head, mx.array([text[-1] for text in texts]), rows)
    found.commit([[0], [0]])
    tree_call = call_on_forest(model, head, Forest.of(_trees(size)), rows)
    tree_call.commit([[0, 1, 3], [0, 2]])
    after = call_on_tokens(model, head, mx.array([text[0] for text in texts]), rows)
    together = [*found.logits[:, 0], tree_call.logits[0, 3], tree_call.logits[1, 2]]
    together += [*after.logits[:, 0]]
    (first, second), (ones, others) = texts, nodes
    paths = [ones[0], ones[1], ones[3]], [others[0], others[2]]
    lines = [first, second, first + paths[0], second + paths[1]]
    lines += [first + paths[0] + first[:1], second + paths[1] + second[:1]]
    alone = [_alone(model, head, line) for line in lines]
    floor = FLOOR.get(alone[0].dtype, 0.3)
    for own, (right, wrong) in zip(together, zip(alone, _swapped(alone), strict=True), strict=True):
        error = rms_difference(own, right)
        if error > floor or ROOM * error > rms_difference(own, wrong):
            return False
    return True


def _tokens(shares: Sequence[Sequence[float]], size: int) -> list[list[int]]:
    return [[int(share * size) for share in row] for row in shares]


def _alone(model: nn.Module, head: Head, line: list[int]) -> Float[mx.array, " V"]:
    return call_on_text(model, head, mx.array(line), make_prompt_cache(model)).logits[-1]


def _swapped(rows: Sequence[mx.array]) -> list[mx.array]:
    return [rows[place ^ 1] for place in range(len(rows))]
