"""A target whose word on a node is, to the last bit, that of plain decoding.

Several rows at once round differently from one: matrix products by their number, attention by the
keys that a node does not see, positions by how they are applied. In float32 that hardly ever shows;
in half precision, with packed weights, or with a quantised cache it changes a text now and then.
Here it does not. Of a tree's call

* products give a row the same bits whatever goes with it (``products``),
* nodes are rotated as single tokens are (``tree_rope``), and attend node by node to the keys that
  a step of plain decoding has (``attention``),
* and all else looks at one row at a time, which is found by trying a tree of sixteen nodes: a model
  for which one bit differs is verified by steps, one a node (``steps``). So are windows, recurrent
  states and larger trees.

Where few rows are multiplied by a kernel, a single row is, too, with and without a drafter.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.kernels.product_source import MOST_ROWS
from mlx_distill.kernels.products import few_rows_chosen
from mlx_distill.target.attention import NotExactError, wrap_attentions
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.products import Products
from mlx_distill.target.steps import call_by_steps
from mlx_distill.target.target import Target
from mlx_distill.target.tree_cache import can_trim
from mlx_distill.target.tree_call import (
    Computed,
    TreeCall,
    call_on_text,
    call_on_tree,
)
from mlx_distill.target.watching import Heard, hearing

# A tree with branches at every depth; its nodes' tokens, and the text before it.
_PARENTS = [0, 0, 0, 1, 1, 2, 3, 0, 4, 6, 6, 7, 9, 2, 12, 5]
_TEXT, _KEPT = [3, 11, 7], [0, 1, 3, 6, 9, 12]


class ExactTarget(Target):
    """A model whose rows do not depend on how many go together.

    Args:
        model: An mlx-lm language model.

    Attributes:
        together: Whether the nodes of a tree are verified in one call, and not by steps.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        wrap_attentions(model)
        known = model.__dict__.get("_mlx_distill_together")
        if known is None:
            known = self.support == "row" and self._agrees()
            object.__setattr__(model, "_mlx_distill_together", known)
        self.together: bool = known

    def observe(
        self, tokens: Int[mx.array, " T"], caches: list[LayerCache], taps: Sequence[int] = ()
    ) -> Computed:
        """Return logits, hidden states and taps of consecutive tokens; a single one is exact."""
        if tokens.size > 1:
            return super().observe(tokens, caches, taps)
        return hearing(self._rows, super().observe, tokens, caches, taps)

    def verify(
        self, tree: PrefixTree, caches: list[LayerCache], taps: Sequence[int] = ()
    ) -> TreeCall:
        """Return the target's word on every node of a tree, as steps of plain decoding say it."""
        few = tree.tokens.size <= MOST_ROWS and all(map(can_trim, caches))
        if few and (self.together or tree.tokens.size == 1):
            call = self.model, self.head, tree, caches, self.support, taps
            return hearing(self._rows, call_on_tree, *call, exact=tree.tokens.size > 1)
        return hearing(self._rows, call_by_steps, self.model, self.head, tree, caches, taps)

    def as_drawn(self, logits: Float[mx.array, "N V"]) -> Float[mx.array, "N V"]:
        """Return the log-probabilities that mlx-lm's loop makes, in the model's precision.

        Rounding may make two likely tokens equal there that were not as logits. They are returned
        as float32: what is half precision would be normalised, and so rounded, once more.
        """
        rows = [logits[row : row + 1] for row in range(logits.shape[0])]
        found = mx.concatenate([row - mx.logsumexp(row, keepdims=True) for row in rows])
        return found.astype(mx.float32)

    def _by_kernels(self) -> Sequence[Heard]:
        return self._rows

    @property
    def _rows(self) -> Sequence[Heard]:
        """What has to be heard so that a row's bits do not depend on those beside it."""
        return self.products.of_few_rows(exact=True)

    def steps(self) -> nn.Module:
        """Return the model for plain decoding by mlx-lm's loop."""
        return ExactSteps(self.model, self.products) if few_rows_chosen() else self.model

    def _agrees(self) -> bool:
        """Return whether the nodes of a tree have the bits of their paths' steps."""
        size = len(_PARENTS)
        tokens = [number * (self.vocab_size - 1) // size for number in range(1, size + 1)]
        tree = PrefixTree.from_parents(mx.array(tokens), mx.array(_PARENTS, mx.int32), 6)
        caches = self._read()
        if not all(map(can_trim, caches)):
            return False
        try:
            to_call = self.model, self.head, tree, caches, self.support
            call = hearing(self._rows, call_on_tree, *to_call, exact=True)
            mx.eval(call.logits, call.hidden)
        except (NotExactError, ValueError, TypeError, RuntimeError):
            return False
        call.commit(_KEPT)
        after = self.observe(tree.tokens[:1], caches).logits
        caches = self._read()
        steps = hearing(self._rows, call_by_steps, self.model, self.head, tree, caches)
        steps.commit(_KEPT)
        expected = self.observe(tree.tokens[:1], caches).logits
        found, wanted = [call.logits, call.hidden, after], [steps.logits, steps.hidden, expected]
        return all(mx.array_equal(a, b).item() for a, b in zip(found, wanted, strict=True))

    def _read(self) -> list[LayerCache]:
        """Return caches that hold the text before the tree."""
        caches = make_prompt_cache(self.model)
        mx.eval(call_on_text(self.model, self.head, mx.array(_TEXT), caches))
        return caches


class ExactSteps(nn.Module):
    """A model for mlx-lm's loop, whose steps are those that a drafted text has.

    Args:
        model: The model.
        products: Multiply its single rows as they do a few.
    """

    def __init__(self, model: nn.Module, products: Products):
        super().__init__()
        self._model = model
        self._products = products

    def __call__(self, tokens: Int[mx.array, "1 T"], **options: Any) -> mx.array:
        """Return the model's logits."""
        if tokens.shape[1] > 1:
            return self._model(tokens, **options)
        heard = self._products.of_few_rows(exact=True)
        return hearing(heard, self._model, tokens, **options)
