"""One call of a model on the trees of several texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.core.forest import Forest, Packing
from mlx_distill.target.attention import wrap_attentions
from mlx_distill.target.batch.layout import Paths, RowsLayout
from mlx_distill.target.batch.rows import Rows
from mlx_distill.target.batch.view import RowsView, view_of
from mlx_distill.target.head import Head
from mlx_distill.target.tree_call import Computed, called
from mlx_distill.target.tree_rope import TreeSpan, tree_span
from mlx_distill.target.watching import during


@dataclass
class RowsCall:
    """The outcome of one call on the trees of several texts, until their paths are committed.

    Args:
        logits: The target's logits at every node.
        hidden: What the target's head saw at every node.
        taps: What the tapped layers returned at every node.
        rows: The texts' keys and values.
        views: The layers' views that took part.
        packing: Where the nodes are in a list, (T, ...); None if they are by texts, (B, N, ...).
    """

    logits: Float[mx.array, "*nodes V"]
    hidden: Float[mx.array, "*nodes D"]
    taps: tuple[Float[mx.array, "*nodes _"], ...]
    rows: Rows
    views: list[RowsView]
    packing: Packing | None = None

    def of(self, text: int, num_nodes: int) -> Computed:
        """Return what was computed at the first nodes of one text."""
        rows = (text, slice(num_nodes))
        if self.packing is not None:
            start = self.packing.starts[text]
            rows = slice(start, start + num_nodes)
        return Computed(self.logits[rows], self.hidden[rows], tuple(x[rows] for x in self.taps))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each text's path, root first, and drop the others.

        A text with an empty path stays as it was. The rows are longer when all of it is written.
        """
        moves = Paths(self.rows.lengths, paths)
        if any(paths):
            for view in self.views:
                view.commit(moves)
        self.rows.lengths = moves.lengths_after


def call_on_forest(
    model: nn.Module,
    head: Head,
    forest: Forest,
    rows: Rows,
    taps: Sequence[int] = (),
    packing: Packing | None = None,
) -> RowsCall:
    """Return a model's word on every node of several texts' trees.

    Args:
        model: The model.
        head: Where its hidden states are.
        forest: The trees.
        rows: What the texts have before them.
        taps: Layers whose outputs are asked for.
        packing: Of the trees, if the model is to be given their nodes as a list.
    """
    mask = None if forest.num_nodes == 1 else forest.mask
    layout = RowsLayout(mask, forest.depths, rows.lengths, forest.max_depth, packing)
    if packing is None:
        return _called(model, head, forest.tokens, layout, rows, taps)
    wrap_attentions(model)
    return _called(model, head, packing.packed(forest.tokens)[None], layout, rows, taps)


def call_on_tokens(
    model: nn.Module,
    head: Head,
    tokens: Int[mx.array, " B"],
    rows: Rows,
    taps: Sequence[int] = (),
) -> RowsCall:
    """Return a model's word on the next token of several texts."""
    layout = RowsLayout(None, mx.zeros((tokens.size, 1), mx.int32), rows.lengths)
    return _called(model, head, tokens[:, None], layout, rows, taps)


def _called(
    model: nn.Module,
    head: Head,
    tokens: Int[mx.array, "B N"],
    layout: RowsLayout,
    rows: Rows,
    taps: Sequence[int],
) -> RowsCall:
    views = [view_of(layer, layout) for layer in rows.layers]
    tokens = mx.maximum(tokens, 0)  # padding is not a token
    packing = layout.packing
    span = TreeSpan(0, 0, batched=packing is None)
    computed = during(tree_span, span, called, model, head, tokens, views, taps)
    if packing is not None:
        return RowsCall(*computed, rows, views, packing)
    shaped = [x.reshape(*tokens.shape, -1) for x in (*computed[:2], *computed.taps)]
    return RowsCall(shaped[0], shaped[1], tuple(shaped[2:]), rows, views)
