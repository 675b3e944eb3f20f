"""One call of a model on the nodes of a tree, or on a run of text, and the hidden states it makes.

tokens   A  B  C  D          mask  1 . . .      depths  0 1 1 2
parents  -  A  A  B                1 1 . .
1 . 1 .
1 1 . 1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError
from mlx_distill.target.copies import PathRows, copied
from mlx_distill.target.head import Head
from mlx_distill.target.layer_cache import LayerCache, cached_tokens, leaves
from mlx_distill.target.taps import Layer, heard_layers
from mlx_distill.target.tree_cache import TreeView, can_trim, copied_cache, tree_cache
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.tree_rope import TreeSpan, tree_span
from mlx_distill.target.watching import during, hearing
from mlx_distill.target.window import as_steps

Support = Literal["row", "batch", "copies", "chain", "none"]


class Computed(NamedTuple):
    """What a call of a model came to, a row per token.

    Args:
        logits: The model's word.
        hidden: What its head saw.
        taps: What the tapped layers returned.
    """

    logits: Float[mx.array, "N V"]
    hidden: Float[mx.array, "N D"]
    taps: tuple[Float[mx.array, "N _"], ...]


@dataclass
class TreeCall:
    """The outcome of one call on a tree, until its path is committed.

    Args:
        logits: The target's logits at every node.
        hidden: What the target's head saw at every node.
        taps: What the tapped layers returned at every node.
        caches: The views of the caches that took part.
        read_again: Reads some nodes once more, one after the other.

    Attributes:
        path: The nodes that were committed, root first.
    """

    logits: Float[mx.array, "N V"]
    hidden: Float[mx.array, "N D"]
    taps: tuple[Float[mx.array, "N _"], ...]
    caches: Sequence[TreeView]
    read_again: Callable[[Sequence[int]], None]

    def __post_init__(self) -> None:
        self.path: Sequence[int] = ()

    def commit(self, path: list[int]) -> None:
        """Keep the nodes of ``path`` (root first) in the caches and drop the others.

        A view may ask for a replay: what it stands for cannot take anything back, as the state of
        a recurrent layer. Then all layers go back to before the call and read the path again.
        """
        self.path = path
        if not all(view.commit(path) for view in self.caches):
            self._replay(len(path))

    def rewind(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        if not all(view.rewind(num_tokens) for view in self.caches):
            self._replay(num_tokens)

    def _replay(self, num_tokens: int) -> None:
        for view in self.caches:
            view.rewind(0)
        self.read_again(self.path[:num_tokens])

    def rebase(self, caches: list[LayerCache]) -> None:
        """Let the views stand for caches that were replaced, by quantised ones for example."""
        for view, cache in zip(self.caches, caches, strict=True):
            view.base = cache


@dataclass
class RootCall(TreeCall):
    """The outcome of a call on a root alone, which the caches took in as any token of a text.

    Args:
        appended: The caches; all of them append, so that they forget by their offsets.
        start: How many tokens they held before.
    """

    appended: Sequence[LayerCache]
    start: int

    def commit(self, path: list[int]) -> None:
        """Keep the root, which is what the caches hold."""

    def rewind(self, num_tokens: int) -> None:
        """Keep the root, or forget it, and all that came later."""
        for cache in leaves(self.appended):
            cache.offset = self.start + num_tokens

    def rebase(self, caches: list[LayerCache]) -> None:
        """Stand for caches that were replaced."""
        self.appended = caches


def call_on_text(
    model: nn.Module,
    head: Head,
    tokens: Int[mx.array, " T"],
    caches: list[LayerCache],
    taps: Sequence[int] = (),
) -> Computed:
    """Return what a model computes at consecutive tokens, which the caches then hold."""
    return called(model, head, tokens[None], caches, taps)


def call_on_root(
    observer: "Observer", root: Int[mx.array, " 1"], caches: list[LayerCache]
) -> RootCall:
    """Return a model's word on a root alone; the caches append, and hold it then."""
    start = cached_tokens(caches)
    return RootCall(*observer(root[None], caches), [], _nothing, caches, start)


def _nothing(nodes: Sequence[int]) -> None:
    """Read nothing again: a root's caches forget by their offsets."""


def call_on_tree(
    model: nn.Module,
    head: Head,
    tree: PrefixTree,
    caches: list[LayerCache],
    support: Support,
    taps: Sequence[int] = (),
    exact: bool = False,
) -> TreeCall:
    """Return a model's word on every node of a tree, in the layout that ``support`` names.

    A root alone is called as any token of a text is: it costs what plain decoding costs.

    Args:
        model: The model.
        head: Where its hidden states are.
        tree: The nodes.
        caches: Hold what is before them.
        support: How the model takes them.
        taps: Layers whose outputs are asked for.
        exact: Whether positions and attention are to be those of steps of plain decoding, to the
            last bit; the tree's shape is read for that.
    """

    def read_again(nodes: Sequence[int]) -> None:
        with as_steps(caches):
            call_on_text(model, head, tree.tokens[mx.array([*nodes])], caches)

    if tree.tokens.size == 1 and all(map(can_trim, caches)):
        return call_on_root(Observer(model, head, taps), tree.tokens, caches)
    start, batched = cached_tokens(caches), support == "batch" and tree.tokens.size > 1
    in_line = tree.in_line or tree.tokens.size == 1
    as_text = support == "chain" or (support == "copies" and in_line)
    layout = TreeLayout(
        tree.mask,
        tree.depths,
        start,
        batched,
        tree.max_depth,
        in_line,
        as_text,
        tree.paths() if exact else None,
    )
    if support == "copies" and not in_line:
        rows = PathRows.of(layout)
        copies = [copied(cache, len(rows.rows)) for cache in caches]
        with as_steps(copies):
            logits, hidden, tapped = called(model, head, rows.spread(tree.tokens), copies, taps)
        at = rows.collected
        pairs = zip(caches, copies, strict=True)
        views = [copied_cache(cache, read, layout, rows) for cache, read in pairs]
        return TreeCall(at(logits), at(hidden), tuple(map(at, tapped)), views, read_again)
    views = [tree_cache(cache, layout) for cache in caches]
    if as_text:
        with as_steps(caches):
            read = call_on_text(model, head, tree.tokens, caches, taps)
        return TreeCall(*read, views, read_again)
    tokens = tree.tokens[:, None] if batched else tree.tokens[None]
    span = TreeSpan(start, tree.max_depth, exact=exact)
    computed = during(tree_span, span, called, model, head, tokens, views, taps)
    return TreeCall(*computed, views, read_again)


def called(
    model: nn.Module,
    head: Head,
    tokens: Int[mx.array, "B T"],
    caches: Sequence[LayerCache],
    taps: Sequence[int],
) -> Computed:
    """Return what a model computes at tokens, whatever stands for its caches."""
    return Observer(model, head, taps)(tokens, caches)


class Observer:
    """Calls a model and sees what its head is given, and what some layers return.

    Args:
        model: The model.
        head: Where its hidden states are.
        taps: The layers.
    """

    def __init__(self, model: nn.Module, head: Head, taps: Sequence[int]):
        self._model, self._taps = model, taps
        self._seen: list[mx.array] = []
        self._outputs: dict[Layer, mx.array] = {}
        self._heard = [head.heard(self._seen), *heard_layers(model, taps, self._outputs)]

    def __call__(self, tokens: Int[mx.array, "B T"], caches: Sequence[LayerCache]) -> Computed:
        """Return what the model computes at tokens."""
        logits = hearing(self._heard, self._model, tokens, cache=caches)
        if not self._seen:
            raise RuntimeError("the head's input was not seen; was the model changed after load?")
        rows = tuple(_rows(self._outputs.pop(tap, None), tokens.shape, tap) for tap in self._taps)
        hidden = self._seen[-1].reshape(tokens.size, -1)
        self._seen.clear()
        return Computed(logits.reshape(tokens.size, -1), hidden, rows)


def _rows(output: mx.array | None, shape: tuple[int, ...], tap: int) -> Float[mx.array, "N _"]:
    """Return a layer's output, a row per token; several streams of one are put side by side."""
    size = shape[0] * shape[1]
    if output is not None and output.shape[:2] == shape:
        return output.reshape(size, -1)
    if output is not None and output.shape[-3:-1] == shape:
        return output.reshape(-1, size, output.shape[-1]).swapaxes(0, 1).reshape(size, -1)
    raise InputError(f"layer {tap} of the target returns nothing that can be tapped")
