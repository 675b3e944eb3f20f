"""One call of a model on the nodes of a tree, or on a run of text, and the hidden states it makes.

tokens   A  B  C  D          mask  1 . . .      depths  0 1 1 2
parents  -  A  A  B                1 1 . .
1 . 1 .
1 1 . 1
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.head import Head
from mlx_distill.target.layer_cache import LayerCache, cached_tokens
from mlx_distill.target.tree_cache import TreeLayout, TreeView, tree_cache
from mlx_distill.target.tree_rope import TreeSpan, tree_span

Support = Literal["row", "batch", "chain", "none"]


@dataclass
class TreeCall:
    """The outcome of one call on a tree, until its path is committed.

    Args:
        logits: The target's logits at every node.
        hidden: What the target's head saw at every node.
        caches: The views of the caches that took part.
    """

    logits: Float[mx.array, "N V"]
    hidden: Float[mx.array, "N D"]
    caches: list[TreeView]

    def commit(self, path: list[int]) -> None:
        """Keep the nodes of ``path`` (root first) in the caches and drop the others.

        This is where a view may answer by replay: one whose state cannot be taken back, such as
        that of a recurrent layer, is remade from the state before the tree and the path's inputs.
        """
        for cache in self.caches:
            cache.commit(path)

    def rewind(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        for cache in self.caches:
            cache.rewind(num_tokens)

    def rebase(self, caches: list[LayerCache]) -> None:
        """Let the views stand for caches that were replaced, by quantised ones for example."""
        for view, cache in zip(self.caches, caches, strict=True):
            view.base = cache


def call_on_text(
    model: nn.Module, head: Head, tokens: Int[mx.array, " T"], caches: list[LayerCache]
) -> tuple[Float[mx.array, "T V"], Float[mx.array, "T D"]]:
    """Return logits and hidden states of consecutive tokens, which the caches then hold."""
    with head.seen() as seen:
        logits = model(tokens[None], cache=caches)[0]
    return logits, _hidden(seen, tokens.size)


def call_on_tree(
    model: nn.Module, head: Head, tree: PrefixTree, caches: list[LayerCache], support: Support
) -> TreeCall:
    """Return a model's word on every node of a tree, in the layout that ``support`` names."""
    start, batched = cached_tokens(caches), support == "batch"
    layout = TreeLayout(tree.mask, tree.depths, start, batched)
    views = [tree_cache(cache, layout) for cache in caches]
    if support == "chain":
        logits, hidden = call_on_text(model, head, tree.tokens, caches)
        return TreeCall(logits, hidden, views)
    nodes = tree.tokens.size
    span = tree_span.set(TreeSpan(start, tree.max_depth))
    try:
        with head.seen() as seen:
            logits = model(tree.tokens[:, None] if batched else tree.tokens[None], cache=views)
    finally:
        tree_span.reset(span)
    return TreeCall(logits.reshape(nodes, -1), _hidden(seen, nodes), views)


def _hidden(seen: list[mx.array], num_tokens: int) -> Float[mx.array, "T D"]:
    if not seen:
        raise RuntimeError("the head's input was not seen; was the model changed after load?")
    return seen[-1].reshape(num_tokens, -1)
