"""Any mlx-lm model as a tree verifier.

``Target`` calls a model on the nodes of a tree, hands out the hidden states that its head saw in
the same forward, and commits the accepted path to the caches. What a model supports is not looked
up in a list: when a target is opened, a small tree is run through it and compared with what the
model says about each path alone. A model that fails every way is refused; it is never served
wrongly.

    tokens   A  B  C  D          mask  1 . . .      depths  0 1 1 2
    parents  -  A  A  B                1 1 . .
                                       1 . 1 .
                                       1 1 . 1
"""

import math
import threading
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_distill.arrays import to_number
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError, not_numbers
from mlx_distill.target.context import context_length
from mlx_distill.target.reading import read_whole
from mlx_distill.target.tree_cache import (
    TreeLayout,
    cached_tokens,
    can_branch,
    can_trim,
    tree_cache,
)
from mlx_distill.target.tree_rope import TreeSpan, tree_span, wrap_ropes

Support = Literal["row", "batch", "chain", "none"]

# Found in float32; in half precision the difference could pass for rounding.
NOT_CAUSAL = {"phi3small"}


class _Seen(threading.local):
    """What the head was given last; texts may be written in several threads."""

    hidden: mx.array | None = None


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
    caches: list[Any]

    def commit(self, path: list[int]) -> None:
        """Keep the nodes of ``path`` (root first) in the caches and drop the others."""
        for cache in self.caches:
            cache.commit(path)

    def rewind(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        for cache in self.caches:
            cache.rewind(num_tokens)

    def rebase(self, caches: list[Any]) -> None:
        """Let the views stand for caches that were replaced, by quantised ones for example."""
        for view, cache in zip(self.caches, caches, strict=True):
            view.base = cache


class Target:
    """A loaded mlx-lm model and what it can do for speculative decoding.

    Open it with ``Target.of``, which remembers the target of a model.

    Args:
        model: An mlx-lm language model.

    Raises:
        InputError: If its logits are not numbers.

    Attributes:
        support: "row" or "batch" (trees, see ``tree_cache``), "chain" or "none".
        reason: Why ``support`` is not a tree, in one sentence; empty otherwise.
        embed: The input embedding, ``(…,) -> (…, E)``; None if there is none to be found.
        hidden_size: Width of the hidden states that the head sees; 0 if there are none.
        vocab_size: Number of logits.
        context: Longest text the model was made for, in tokens; None where it does not say.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.embed: nn.Module | None = None
        self.hidden_size = 0
        self.vocab_size = 0
        self.context = context_length(model)
        self._seen = _Seen()
        wrap_ropes(model)
        self.support, self.reason = self._open()

    @classmethod
    def of(cls, model: nn.Module) -> "Target":
        """Return the target of a model; it is opened once."""
        target = getattr(model, "_mlx_distill_target", None)
        if target is None:
            target = cls(model)
            object.__setattr__(model, "_mlx_distill_target", target)
        return target

    def require_drafting(self) -> None:
        """Raise InputError if the model cannot be drafted for."""
        if self.support == "none":
            kind = getattr(self.model, "model_type", type(self.model).__name__)
            raise InputError(f"{kind} cannot be drafted for: {self.reason}; use --no-drafter")

    def check_caches(self, caches: list[Any]) -> None:
        """Raise InputError if a prompt cache is not one that this target can draft with."""
        fits = can_trim if self.support == "chain" else can_branch
        wrong = sorted({type(cache).__name__ for cache in caches if not fits(cache)})
        if wrong:
            raise InputError(
                f"the cache ({', '.join(wrong)}) cannot hold the drafts of this model; "
                "use another, or decode without a drafter"
            )

    def forward(
        self, tokens: Int[mx.array, " T"], caches: list[Any]
    ) -> tuple[Float[mx.array, "T V"], Float[mx.array, "T D"]]:
        """Return logits and hidden states of consecutive tokens, which the caches then hold."""
        self._seen.hidden = None
        logits = self.model(tokens[None], cache=caches)[0]
        return logits, self._hidden(tokens.size)

    def read(
        self, texts: Int[mx.array, "B T"]
    ) -> tuple[Float[mx.array, "B T V"], Float[mx.array, "B T D"]]:
        """Return logits and hidden states of whole texts, right-padded; nothing is cached."""
        self._seen.hidden = None
        logits = read_whole(self.model, texts)
        return logits, self._hidden(texts.size).reshape(*texts.shape, -1)

    def verify(self, tree: PrefixTree, caches: list[Any]) -> TreeCall:
        """Return the target's word on every node of a tree; commit the result's path afterwards.

        Args:
            tree: Its root is the token that every path begins with.
            caches: The prompt cache, which does not hold the root yet.
        """
        start, batched = cached_tokens(caches), self.support == "batch"
        layout = TreeLayout(tree.mask, tree.depths, start, batched)
        views = [tree_cache(cache, layout) for cache in caches]
        if self.support == "chain":
            logits, hidden = self.forward(tree.tokens, caches)
            return TreeCall(logits, hidden, views)
        self._seen.hidden = None
        nodes = tree.tokens.size
        inputs = tree.tokens[:, None] if batched else tree.tokens[None]
        span = tree_span.set(TreeSpan(start, tree.max_depth))
        try:
            logits = self.model(inputs, cache=views)
        finally:
            tree_span.reset(span)
        return TreeCall(logits.reshape(nodes, -1), self._hidden(nodes), views)

    def _hidden(self, num_tokens: int) -> Float[mx.array, "T D"]:
        if self._seen.hidden is None:
            raise RuntimeError("the head's input was not seen; was the model changed after load?")
        return self._seen.hidden.reshape(num_tokens, -1)

    def _open(self) -> tuple[Support, str]:
        if getattr(self.model, "model_type", None) in NOT_CAUSAL:
            return "none", "mlx-lm's version lets the tokens of a prompt see later ones"
        caches = make_prompt_cache(self.model)
        if not all(can_branch(cache) for cache in caches):
            names = sorted({type(c).__name__ for c in caches if not can_branch(c)})
            return "none", f"its cache ({', '.join(names)}) cannot hold the branches of a tree"
        # Any tokens do; these are apart, small enough for every vocabulary, and not all the same.
        prefix = mx.array([1, 2, 3, 1, 2])
        logits = self._find_head(prefix, caches)
        mx.eval(logits)
        self.vocab_size = logits.shape[-1]
        if to_number(mx.isnan(logits).any()):
            raise not_numbers("after a few tokens")
        if self._seen.hidden is None or self.embed is None:
            return "none", "its head or its embedding was not found, so it gives no hidden state"
        self.hidden_size = self._seen.hidden.shape[-1]
        for support in ("row", "batch", "chain"):
            self.support = support
            if support == "chain" and not all(can_trim(cache) for cache in caches):
                break
            if self._agrees(prefix):
                return support, "" if support != "chain" else "its attention cannot take a tree"
        return "none", "its logits for several tokens at once differ from those one by one"

    def _find_head(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """Run the model once with every candidate watched; keep watching only the head."""
        heads, inputs = [], []
        for _, module in self.model.named_modules():
            if _is_projection(module):
                _watch(module, heads, inputs)
        logits = self.model(tokens[None], cache=caches)
        self.embed = inputs[0][0] if inputs else None
        last = [entry for entry in heads if entry[2].shape[-1] == logits.shape[-1]][-1:]
        for module in {id(m): m for _, m in self.model.named_modules()}.values():
            _unwatch(module)
        for module, seen, _ in last:
            _watch_head(module, self._seen)
            self._seen.hidden = seen
        return logits

    def _agrees(self, prefix: mx.array) -> bool:
        """Return whether a small tree's logits equal those of its paths, and the commit holds.

        Trees and plain text round differently, so the tolerance is what plain decoding differs
        from reading the same text at once, with room. A wrong mask or position is off by the
        logits' own spread.
        """
        chain = self.support == "chain"
        parents = [-1, 0, 1, 2] if chain else [-1, 0, 0, 1]
        paths = _paths(parents)
        tokens = mx.array([4, 5, 6, 5])
        tree = PrefixTree.from_parents(tokens, mx.maximum(mx.array(parents), 0), 3)
        caches = self._prefilled(prefix)
        try:
            call = self.verify(tree, caches)
            mx.eval(call.logits)
            call.commit(paths[2] if chain else paths[3])
            after, _ = self.forward(prefix[:1], caches)
            mx.eval(after)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            return False
        texts = [mx.concatenate([prefix, tokens[mx.array(path)]]) for path in paths]
        kept = paths[2] if chain else paths[3]  # a chain's last token is rejected
        texts.append(mx.concatenate([prefix, tokens[mx.array(kept)], prefix[:1]]))
        read = [self.forward(text, make_prompt_cache(self.model))[0][-1] for text in texts]
        caches = self._prefilled(prefix)
        plain = mx.array(0)
        for i in paths[3]:
            plain, _ = self.forward(tokens[i : i + 1], caches)
        noise = _difference(plain[0], read[3])
        limit = 1e-3 if plain.dtype == mx.float32 else 0.1
        found = [*call.logits, after[0]]
        worst = max(_difference(a, b) for a, b in zip(found, read, strict=True))
        return noise <= limit and worst <= max(4 * noise, limit)

    def _prefilled(self, prefix: mx.array) -> list[Any]:
        caches = make_prompt_cache(self.model)
        mx.eval(self.forward(prefix, caches))
        return caches


def _paths(parents: list[int]) -> list[list[int]]:
    """Return the path from the root to each node."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def _difference(a: mx.array, b: mx.array) -> float:
    """Return the largest difference of two rows of logits, in units of the second's spread."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    barred = b == -mx.inf  # tokens that a model never writes
    b = mx.where(barred, 0, b)
    difference = mx.max(mx.where(barred, 0, mx.abs(a - b))) / mx.maximum(mx.std(b), 1e-6)
    value = to_number(difference)
    return math.inf if math.isnan(value) else value


def _is_projection(module: nn.Module) -> bool:
    """Return whether a module could be the embedding or the head: a matrix with a row per token."""
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2


def _watch(module: nn.Module, heads: list[Any], inputs: list[Any]) -> None:
    """Report every call of a module: with token ids to ``inputs``, with states to ``heads``."""
    kind = type(module)

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        out = kind.__call__(self, x, *args, **kwargs)
        if isinstance(x, mx.array) and isinstance(out, mx.array):  # not the gates of experts
            (inputs if mx.issubdtype(x.dtype, mx.integer) else heads).append((self, x, out))
        return out

    methods: dict[str, Any] = {"__call__": call, "watched_class": kind}
    if hasattr(kind, "as_linear"):

        def as_linear(self: Any, x: mx.array) -> mx.array:
            out = kind.as_linear(self, x)  # pyright: ignore[reportAttributeAccessIssue]
            heads.append((self, x, out))
            return out

        methods["as_linear"] = as_linear
    module.__class__ = type(kind.__name__, (kind,), methods)


def _unwatch(module: nn.Module) -> None:
    kind = getattr(type(module), "watched_class", None)
    if kind is not None:
        module.__class__ = kind


def _watch_head(module: nn.Module, seen: _Seen) -> None:
    """Put what a head is given into ``seen``, at every call from now on."""
    kind = type(module)
    name = "as_linear" if hasattr(kind, "as_linear") else "__call__"

    def call(self: Any, x: mx.array) -> mx.array:
        seen.hidden = x
        return getattr(kind, name)(self, x)

    module.__class__ = type(kind.__name__, (kind,), {name: call, "watched_class": kind})
