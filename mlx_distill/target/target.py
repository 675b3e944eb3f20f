"""Any mlx-lm model as a tree verifier.

``Target`` calls a model on the nodes of a tree, hands out the hidden states that its head saw in
the same forward, and commits the accepted path to the caches. What a model supports is not looked
up in a list but found out when it is opened (``opening``).
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn
from mlx_lm.models.cache import RotatingKVCache

from mlx_distill.core.forest import Forest
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError
from mlx_distill.kernels import exponentials
from mlx_distill.kernels.products import few_rows_chosen
from mlx_distill.target import powers
from mlx_distill.target.attention import attends_by_kernel, wrap_attentions
from mlx_distill.target.batch.call import RowsCall, call_on_forest, call_on_tokens
from mlx_distill.target.batch.rows import Rows
from mlx_distill.target.batch.trial import packs, takes_batches
from mlx_distill.target.context import context_length
from mlx_distill.target.head import Head
from mlx_distill.target.joined_layers import JoinedLayers, layers_chosen
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.opening import COUNTS_SLOTS, Opened, open_model
from mlx_distill.target.products import Products
from mlx_distill.target.reading import read_whole
from mlx_distill.target.restoring import can_restore
from mlx_distill.target.tree_cache import can_branch
from mlx_distill.target.tree_call import (
    Computed,
    Observer,
    RootCall,
    Support,
    TreeCall,
    call_on_root,
    call_on_text,
    call_on_tree,
    called,
)
from mlx_distill.target.watching import Heard, during, hearing

_opening = threading.Lock()


class Target:
    """A loaded mlx-lm model and what it can do for speculative decoding.

    Open it with ``Target.of``: a model is opened once, and there is one target of it at a time.

    Args:
        model: An mlx-lm language model.
        known: What it was found to support before; None to find out.

    Raises:
        InputError: If its logits are not numbers.

    Attributes:
        support: "row" or "batch" (trees, see ``tree_cache``), "copies" (trees, see ``copies``),
            "chain" or "none".
        reason: Why ``support`` is not a tree, in one sentence; empty otherwise.
        embed: The input embedding, ``(…,) -> (…, E)``; None if there is none to be found.
        hidden_size: Width of the hidden states that the head sees; 0 if there are none.
        vocab_size: Number of logits.
        context: Longest text the model was made for, in tokens; None where it does not say.
    """

    def __init__(self, model: nn.Module, known: str | None = None):
        self.model = model
        opened = _opened(model, known)
        self.support: Support = opened.support
        self.reason = opened.reason
        self.embed = opened.embed
        self.hidden_size = opened.hidden_size
        self.vocab_size = opened.vocab_size
        self.context = context_length(model)
        self._head = opened.head
        self._knows_powers = False

    @classmethod
    def of(cls, model: nn.Module, known: str | None = None) -> "Target":
        """Return the target of a model; it is opened once, as what is known of it.

        What was found lies with the model and refers to parts of it alone; the target is known
        there by a weak reference. So a model that is deleted is gone at once.

        Raises:
            InputError: If it is no network.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"a model must be a network, as load returns, got {model!r:.40}")
        kept = model.__dict__.get("_mlx_distill_target")
        target = kept() if kept else None
        if target is None or target.model is not model:  # a copied model has the other's
            target = cls(model, known)
            object.__setattr__(model, "_mlx_distill_target", weakref.ref(target))
        return target

    def require_drafting(self) -> None:
        """Raise InputError if the model cannot be drafted for."""
        if self.support == "none":
            kind = getattr(self.model, "model_type", type(self.model).__name__)
            raise InputError(f"{kind} cannot be drafted for: {self.reason}; use --no-drafter")

    def check_caches(self, caches: list[LayerCache]) -> None:
        """Raise InputError if a prompt cache is not one that this target can draft with."""
        fits = can_restore if self.prefers_lines else can_branch
        slots = getattr(self.model, "model_type", None) in COUNTS_SLOTS
        wrong = sorted(
            {
                type(cache).__name__
                for cache in caches
                if not fits(cache) or (slots and isinstance(cache, RotatingKVCache))
            }
        )
        if wrong:
            raise InputError(
                f"the cache ({', '.join(wrong)}) cannot hold the drafts of this model; "
                "use another, or decode without a drafter"
            )

    def forward(
        self, tokens: Int[mx.array, " T"], caches: list[LayerCache]
    ) -> tuple[Float[mx.array, "T V"], Float[mx.array, "T D"]]:
        """Return logits and hidden states of consecutive tokens, which the caches then hold."""
        return self.observe(tokens, caches)[:2]

    def observe(
        self, tokens: Int[mx.array, " T"], caches: list[LayerCache], taps: Sequence[int] = ()
    ) -> Computed:
        """Return the same, and what some layers return, by their numbers."""
        return call_on_text(self.model, self.head, tokens, caches, taps)

    def observe_all(
        self, tokens: Int[mx.array, "B T"], caches: list[LayerCache], taps: Sequence[int] = ()
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """Return the same of several texts, (B, T, ...); the caches hold a row for each."""
        logits, hidden, tapped = called(self.model, self.head, tokens, caches, taps)
        logits, hidden, *rest = (x.reshape(*tokens.shape, -1) for x in (logits, hidden, *tapped))
        return logits, hidden, rest

    def read(
        self, texts: Int[mx.array, "B T"]
    ) -> tuple[Float[mx.array, "B T V"], Float[mx.array, "B T D"]]:
        """Return logits and hidden states of whole texts, right-padded; nothing is cached."""
        seen: list[mx.array] = []
        logits = hearing([self.head.heard(seen)], read_whole, self.model, texts)
        return logits, seen[-1].reshape(*texts.shape, -1)

    def verify(
        self, tree: PrefixTree, caches: list[LayerCache], taps: Sequence[int] = ()
    ) -> TreeCall:
        """Return the target's word on every node of a tree; commit the result's path afterwards.

        Args:
            tree: Its root is the token that every path begins with.
            caches: The prompt cache, which does not hold the root yet.
            taps: Numbers of the layers whose outputs the call has, too.
        """
        call = self.model, self.head, tree, caches, self.support, taps
        heard = self._by_kernels()
        if tree.tokens.size > 1 and exponentials.by_powers():
            self._teach_powers()
            return during(powers.in_use, True, hearing, heard, call_on_tree, *call)
        return hearing(heard, call_on_tree, *call)

    def _teach_powers(self) -> None:
        """Teach the modules to use them, once."""
        if not self._knows_powers:
            wrap_attentions(self.model)
            powers.teach_gates(self.model)
            self._knows_powers = True

    def stepper(
        self, taps: Sequence[int] = ()
    ) -> Callable[[Int[mx.array, " 1"], list[LayerCache]], RootCall]:
        """Return what does for one root after the other what ``verify`` does, as quickly as can be.

        Its caches have to append.
        """
        observer = Observer(self.model, self.head, taps)
        step, heard = partial(call_on_root, observer), self._by_kernels()
        return partial(hearing, heard, step) if heard else step

    def _by_kernels(self) -> Sequence[Heard]:
        """Return what has to be heard so that the kernels that were chosen make calls of few rows.

        Nothing is looked for where none was.
        """
        if attends_by_kernel():
            wrap_attentions(self.model)
        products = self.products.of_few_rows(exact=False) if few_rows_chosen() else ()
        layers = self._layers.of_few_rows() if layers_chosen() else ()
        return (*products, *layers)

    @cached_property
    def products(self) -> Products:
        """What multiplies by the model's matrices."""
        return Products(self.model)

    @cached_property
    def _layers(self) -> JoinedLayers:
        return JoinedLayers(self.model)

    @property
    def prefers_lines(self) -> bool:
        """Whether a line of nodes is the only tree, or one that costs far less than others."""
        return self.support in ("copies", "chain")

    @property
    def takes_batches(self) -> bool:
        """Whether the trees of several texts can be verified in one call; tried when asked."""
        return self.support == "row" and takes_batches(self.model, self.head)

    def verify_rows(self, forest: Forest, rows: Rows, taps: Sequence[int] = ()) -> RowsCall:
        """Return the target's word on the trees of several texts; see ``verify``.

        Args:
            forest: A tree per text.
            rows: What the texts have before their roots.
            taps: As in ``verify``.
        """
        packing = forest.packing if packs(self.model, self.head, rows) else None
        return call_on_forest(self.model, self.head, forest, rows, taps, packing)

    def read_rows(
        self, tokens: Int[mx.array, " B"], rows: Rows, taps: Sequence[int] = ()
    ) -> RowsCall:
        """Return the target's word on the next token of several texts."""
        return call_on_tokens(self.model, self.head, tokens, rows, taps)

    def as_drawn(self, logits: Float[mx.array, "N V"]) -> Float[mx.array, "N V"]:
        """Return what tokens are drawn from: the logits, or what plain decoding makes of them."""
        return logits

    @property
    def head(self) -> Head:
        """Where the hidden states are; InputError if no place was found."""
        if self._head is None:
            self.require_drafting()
            raise RuntimeError("the model has no head")
        return self._head


def _opened(model: nn.Module, known: str | None) -> Opened:
    """Return what a model was found to support; a copy of an opened model knows it, too."""
    with _opening:
        opened = model.__dict__.get("_mlx_distill_opened")
        if opened is None:
            opened = open_model(model, known)
            object.__setattr__(model, "_mlx_distill_opened", opened)
        return opened
