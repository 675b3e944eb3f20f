"""What a model can do for drafting is found by trying, when it is opened.

A small tree is run through it and compared with what the model says about each path alone. A model
that fails every way is refused; it is never served wrongly. What sets in later in a text (windows,
chunks, budgets, scales) is beyond such a look; ``tests/test_architectures.py`` tries every
architecture there, and those it found are named here.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from jaxtyping import Float
from mlx import nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_distill.arrays import to_number
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import not_numbers
from mlx_distill.target.head import Head, find_head
from mlx_distill.target.layer_cache import LayerCache, leaves
from mlx_distill.target.recurrent.mixers import wrap_mixers
from mlx_distill.target.restoring import can_restore
from mlx_distill.target.tree_cache import can_branch
from mlx_distill.target.tree_call import Support, call_on_text, call_on_tree
from mlx_distill.target.tree_rope import wrap_ropes

# Found in float32; in half precision the difference could pass for rounding.
NOT_CAUSAL = {"phi3small"}
# Beyond its block budget it places queries by their slot: siblings would count as successors.
PLACED_BY_SLOT = {"minimax_m3_vl", "minimax_m3"}
# The number of slots is the position for some of its layers, so in a full window it stands still.
COUNTS_SLOTS = {"afm7"}

# Any tokens do in float32. In half precision some texts are all but noise (the first tokens of a
# vocabulary are often marks), so others are tried, too: what is wrong is wrong in all of them.
# The tokens are apart and not all the same; the first three are the text before the tree.
_LOW = [1, 2, 3, 4, 5, 6, 7, 8, 9, 5]
_SPREAD = ([3, 11, 7, 17, 5, 19, 2, 13, 9, 5], [16, 4, 14, 8, 20, 1, 10, 18, 6, 20])
# Five siblings, so that with a wrong mask the last one sees more that it should not than it should,
# and a child of the first. Those two and the root are looked at.
_TREE, _LOOKED_AT = [0, 0, 0, 0, 0, 0, 1], [0, 5, 6]
_CHAIN = [0, 0, 1, 2]

# Errors are root mean squares over the vocabulary, in units of the logits' spread. A node has to
# be this many times nearer to its own path than with a wrong mask or position. In half precision
# that is what decides: in deep models, the rounding of several rows at once reaches a tenth there.
ROOM = 4.0
FLOOR = {mx.float32: 1e-3, mx.float16: 0.1, mx.bfloat16: 0.3}
# Plain decoding itself differs from reading the same text at once, by rounding (TF32 among it).
PLAIN = {mx.float32: 0.02, mx.float16: 0.2, mx.bfloat16: 0.5}


@dataclass(frozen=True)
class Opened:
    """What was found about a model.

    Args:
        support: "row" or "batch" (trees, see ``tree_cache``), "copies" (trees, see ``copies``),
            "chain" or "none".
        reason: Why ``support`` is not a tree, in one sentence; empty otherwise.
        vocab_size: Number of logits.
        hidden_size: Width of the hidden states; 0 if there are none.
        head: Where they are.
        embed: The input embedding.
    """

    support: Support
    reason: str
    vocab_size: int = 0
    hidden_size: int = 0
    head: Head | None = None
    embed: nn.Module | None = None


def open_model(model: nn.Module, known: str | None = None) -> Opened:
    """Find out what a model supports.

    Args:
        model: The model.
        known: Which way was found before, with the same code, weights and device; None to try them.

    Raises:
        InputError: If its logits are not numbers.
    """
    kind = getattr(model, "model_type", None)
    if kind in NOT_CAUSAL:
        return Opened("none", "mlx-lm's version lets the tokens of a prompt see later ones")
    wrap_ropes(model)
    wrap_mixers(model)
    caches = make_prompt_cache(model)
    logits, hidden, head, embed = find_head(model, mx.array([_LOW[:3]]), cache=caches)
    if to_number(mx.isnan(logits).any()):
        raise not_numbers("after a few tokens")
    if head is None or hidden is None or embed is None:
        reason = "its head or its embedding was not found, so it gives no hidden state"
        return Opened("none", reason, logits.shape[-1])
    ways = _ways(caches, kind)
    reason = "its logits for several tokens at once differ from those one by one"
    found = Opened("none", reason, logits.shape[-1], hidden.shape[-1], head, embed)
    texts = [_LOW]
    if logits.dtype != mx.float32:
        texts += [[logits.shape[-1] * part // 23 for part in parts] for parts in _SPREAD]
    tries = ((way, _Trial(model, head, way, text)) for way in ways for text in texts)
    support = next((way for way in ways if way == known), None)
    support = support or next((way for way, trial in tries if trial.agrees()), None)
    if support is None:
        return found
    return replace(found, support=support, reason=_why_not_trees(support, caches))


def _ways(caches: list[LayerCache], kind: str | None) -> list[Support]:
    """Return the ways that a model may support, the best first."""
    ways: list[Support] = []
    if all(map(can_branch, caches)) and kind not in PLACED_BY_SLOT:
        # States are one text's: nodes cannot be rows of a batch.
        ways = ["row"] if any(map(_is_recurrent, caches)) else ["row", "batch"]
    return [*ways, "copies", "chain"] if all(map(can_restore, caches)) else ways


def _is_recurrent(cache: LayerCache) -> bool:
    return any(type(part) is ArraysCache for part in leaves([cache]))


def _why_not_trees(support: str, caches: list[LayerCache]) -> str:
    """Return why a model with these caches takes no trees."""
    if support != "chain":
        return ""
    kept = (c for c in caches if _is_recurrent(c) or not can_branch(c))
    names = ", ".join(sorted({type(c).__name__ for c in kept}))
    if not names:
        return "its attention cannot take a tree"
    return (
        f"its cache ({names}) holds no branches; where a draft is cut, what is kept is read again"
    )


class _Trial:
    """A small tree, in one layout, against what the model says about its paths.

    Args:
        model: The model.
        head: Where its hidden states are.
        support: The layout.
        text: Three tokens before the tree, and the tree's.
    """

    def __init__(self, model: nn.Module, head: Head, support: Support, text: Sequence[int]):
        self.model, self.head = model, head
        self.support: Support = support
        parents, nodes = (_CHAIN, [0, 1, 2, 3]) if support == "chain" else (_TREE, _LOOKED_AT)
        self.prefix, self.tokens = list(text[:3]), list(text[3:])
        self._caches: list[LayerCache] | None = None
        tokens = mx.array(self.tokens[: len(parents)])
        self.tree = PrefixTree.from_parents(tokens, mx.array(parents), 3)
        paths = self.tree.paths()
        self.nodes, self.paths = mx.array(nodes), [paths[node] for node in nodes]
        # A chain's last token is rejected, for the rollback's sake.
        self.kept = paths[2] if support == "chain" else paths[6]

    def agrees(self) -> bool:
        """Return whether the nodes' logits equal those of their paths, and the commit holds.

        Trees and plain text round differently, so the limit is what plain decoding differs from
        reading the same text at once, with room; and a node has to be nearer, as many times, to
        its own path's logits than it is with a wrong mask, or with a wrong position.
        """
        try:
            found = self._found(self.kept)
            read = [self._read(path) for path in self.paths]
            read.append(self._read(self.kept, self.prefix[:1]))
            if any(row.shape != read[0].shape for row in found):  # of a state beside the caches
                return False
            error = _mean(_errors(found, read))
            noise = max(_errors([self._plainly(self.paths[-1])], read[-2:-1]))
            wrong = self._wrong(read)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            return False
        kind = read[0].dtype
        return (
            noise <= PLAIN.get(kind, 0.5)
            and error <= max(ROOM * noise, FLOOR.get(kind, 0.3))
            and ROOM * error <= wrong
        )

    def _found(self, kept: list[int]) -> list[mx.array]:
        """Return the nodes' logits, and those of a token after the commit of a path."""
        caches = self._prefilled()
        call = call_on_tree(self.model, self.head, self.tree, caches, self.support)
        mx.eval(call.logits)
        call.commit(kept)
        after = call_on_text(self.model, self.head, mx.array(self.prefix[:1]), caches).logits[0]
        mx.eval(after)
        return [*call.logits[self.nodes], after]

    def _read(self, path: Sequence[int], more: Sequence[int] = ()) -> Float[mx.array, " V"]:
        text = [*self.prefix, *(self.tokens[node] for node in path), *more]
        caches = make_prompt_cache(self.model)
        return call_on_text(self.model, self.head, mx.array(text), caches).logits[-1]

    def _plainly(self, path: Sequence[int]) -> Float[mx.array, " V"]:
        caches = self._prefilled()
        logits = mx.array(0)
        for node in path:
            token = mx.array(self.tokens[node : node + 1])
            logits = call_on_text(self.model, self.head, token, caches).logits
        return logits[-1]

    def _wrong(self, read: list[mx.array]) -> float:
        """Return the error of the nodes with a wrong mask, or with wrong positions.

        A model without positions does not notice the second: then it does not count. A chain has no
        mask that could be wrong; there, it is the error after a commit that keeps the whole draft.
        """
        if self.support == "chain":
            return rms_difference(self._found(list(range(len(_CHAIN))))[-1], read[-1])
        tree = self.tree
        line = mx.arange(tree.depths.size)
        siblings = replace(tree, mask=line[None] <= line[:, None])
        moved = replace(tree, depths=tree.depths + 3 * (line > 0), max_depth=tree.max_depth + 3)
        errors = []
        for wrong in (siblings, moved):
            call = call_on_tree(self.model, self.head, wrong, self._prefilled(), self.support)
            errors.append(_mean(_errors([*call.logits[self.nodes]][1:], read[1:-1])))
        noticed = errors[1] > FLOOR.get(read[0].dtype, 0.3)
        return min(errors) if noticed else errors[0]

    def _prefilled(self) -> list[LayerCache]:
        """Return caches that hold the text before the tree; it is read once."""
        if self._caches is None:
            self._caches = make_prompt_cache(self.model)
            mx.eval(call_on_text(self.model, self.head, mx.array(self.prefix), self._caches))
        return copy.deepcopy(self._caches)


def _errors(found: Sequence[mx.array], expected: Sequence[mx.array]) -> list[float]:
    return [rms_difference(a, b) for a, b in zip(found, expected, strict=True)]


def _mean(errors: Sequence[float]) -> float:
    """Return the root mean square of errors."""
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def rms_difference(a: Float[mx.array, " V"], b: Float[mx.array, " V"]) -> float:
    """Return the root mean square difference of two rows, in units of the second's spread."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    barred = b == -mx.inf  # tokens that a model never writes
    difference = mx.where(barred, 0, a - mx.where(barred, 0, b))
    spread = mx.maximum(mx.std(mx.where(barred, 0, b)), 1e-6)
    value = to_number(mx.sqrt(mx.mean(mx.square(difference))) / spread)
    return math.inf if math.isnan(value) else value
