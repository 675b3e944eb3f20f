"""Medusa heads at work: what all of them say is known at once, so a draft is a choice among few.

    head 1   A .5  B .3  C .1        A  A D  B  B D  A E
    head 2   D .6  E .2  F .1       .5  .30 .3  .18  .10

The best tokens of every head are found once, and a path is as likely as their product.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import mlx.core as mx
from jaxtyping import Float, Int, Integer
from mlx import nn

from mlx_distill.arrays import log_sum_exp
from mlx_distill.core.beam_search import Listed, beam_search
from mlx_distill.core.beam_searches import beam_searches, top_values
from mlx_distill.core.draft import Draft
from mlx_distill.core.static_tree import StaticTree
from mlx_distill.drafters.compiling import Arrays, CompiledDrafts
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.last_seen import LastSeen
from mlx_distill.drafters.medusa import MedusaConfig, MedusaHeads
from mlx_distill.drafters.protocol import NO_STATIC_TREE, DraftPlan, Features
from mlx_distill.errors import InputError


class MedusaDrafter:
    """Medusa heads, ready to draft: a ``Drafter`` for the loop.

    Args:
        network: The heads.
        target: Fingerprint of the target that they were trained for.

    Attributes:
        taps: The target's layers that they see, too.
        look_back: How many of a prompt's last tokens they want to see.
    """

    look_back = 1

    def __init__(self, network: MedusaHeads, target: Fingerprint):
        self.network = network
        self.target = target
        self.taps = network.config.taps
        self._stacks = Stacks(network)
        self.searches = CompiledDrafts()

    @property
    def has_static_tree(self) -> bool:
        """Whether it is known which choices of the heads are right how often."""
        return bool(self.config.hit_rates)

    @property
    def config(self) -> MedusaConfig:
        """The network's shape."""
        return self.network.config

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> LastSeen:
        """Return the state of a text: what the target's head saw last."""
        return LastSeen(self.draft, features)

    def draft(
        self,
        hidden: Float[mx.array, " D"],
        root: Int[mx.array, " 1"],
        plan: DraftPlan,
        noise: Float[mx.array, "L V"] | None = None,
        taps: Float[mx.array, "T D"] | None = None,
    ) -> Draft:
        """Return the beams that follow a root.

        Args:
            hidden: What the target's head saw before, when it chose the root.
            root: The token that is certain.
            plan: How many beams, and how long; no longer than there are heads.
            noise: What will be added to the target's logits; None at temperature 0.
            taps: What the tapped layers returned where the head saw that.
        """
        length = min(plan.draft_length, self.config.num_heads)
        arrays = (hidden, taps, root) if noise is None else (hidden, taps, root, noise)
        if plan.tree == "static":
            tree = self.static_tree(plan)
            kind = ("static", plan.nodes, length, noise is not None)
            return tree.draft(self.searches.of(kind, partial(self._static_tokens, tree))(*arrays))
        kind = ("beams", plan.beam_width, length, noise is not None)
        made = self.searches.of(kind, partial(self._beams, plan.beam_width, length))(*arrays)
        return Draft(*made, max_depth=length)

    def static_tree(self, plan: DraftPlan) -> StaticTree:
        """Return the tree of a plan's nodes and length that is made by the heads' hit rates.

        Raises:
            InputError: If these were never measured.
        """
        rates = self.config.hit_rates[: plan.draft_length]
        if not rates:
            raise InputError(NO_STATIC_TREE)
        return _static_tree(rates, plan.nodes)

    def _static_tokens(
        self,
        tree: StaticTree,
        serial: int,
        hidden: mx.array,
        taps: mx.array | None,
        root: mx.array,
        noise: mx.array | None = None,
    ) -> Int[mx.array, " N"]:
        """Return the tokens of a static tree."""
        best = self._choices(self._logits(hidden, taps, tree.heads, noise), tree.choices)
        return mx.concatenate([root, best.reshape(-1)[tree.places]]).astype(mx.int32)

    def _choices(self, logits: Float[mx.array, "R K"], count: int) -> Integer[mx.array, "R C"]:
        """Return the best tokens of every row, the best first."""
        best, scores = top_values(logits, count)
        order = mx.argsort(-scores, axis=1)
        return self._tokens(mx.take_along_axis(best, order, axis=1))

    def _beams(
        self,
        width: int,
        length: int,
        serial: int,
        hidden: mx.array,
        taps: mx.array | None,
        root: mx.array,
        noise: mx.array | None = None,
    ) -> Arrays:
        logits = self._logits(hidden, taps, length, noise)
        width = min(width, logits.shape[-1])
        best, scores = top_values(logits, width)
        best, totals = self._tokens(best), log_sum_exp(logits)
        rows = iter(range(length))  # one per step, in the search's order

        def step(tokens: mx.array, beams: mx.array | None) -> tuple[Listed, mx.array]:
            here = next(rows)
            here = slice(here, here + 1)
            count = tokens.size
            logits, columns = (mx.broadcast_to(x[here], (count, width)) for x in (scores, best))
            total = mx.broadcast_to(totals[here], (count, 1))
            return Listed(logits, columns, total), tokens

        draft = beam_search(step, root, None, width, length, num_tokens=self.config.vocab_size)
        return draft.tokens, draft.parents, draft.depths, draft.scores

    def draft_everywhere(
        self,
        roots: Int[mx.array, " S"],
        features: Features,
        plan: DraftPlan,
        noise: Float[mx.array, "N V"] | None = None,
        earlier: int = 0,
    ) -> Draft:
        """Return the drafts of many roots; see ``DraftsEverywhere``."""
        hidden, roots = (
            self.network.joined(features.states, features.taps)[earlier:],
            roots[earlier:],
        )
        length = min(plan.draft_length, self.config.num_heads)
        rows = iter(range(length))

        def logits_of(number: int) -> mx.array:
            x = self.network.features(number, hidden)
            seen = None if noise is None else noise[number : number + roots.size]
            return self._sharpened(self._stacks.logits(x, number), seen)

        if plan.tree == "static":
            return self._static_everywhere(self.static_tree(plan), roots, logits_of)

        def step(columns: mx.array, beams: mx.array | None) -> tuple[mx.array, mx.array]:
            return mx.repeat(logits_of(next(rows)), columns.size // roots.size, axis=0), columns

        draft = beam_searches(step, roots, plan.beam_width, length)
        tokens = mx.concatenate([roots[:, None], self._tokens(draft.tokens[:, 1:])], axis=1)
        return Draft(
            tokens.astype(mx.int32), draft.parents, draft.depths, draft.scores, draft.max_depth
        )

    def _static_everywhere(
        self,
        tree: StaticTree,
        roots: Int[mx.array, " S"],
        logits_of: Callable[[int], Float[mx.array, "S K"]],
    ) -> Draft:
        best = [self._choices(logits_of(number), tree.choices) for number in range(tree.heads)]
        tokens = mx.concatenate(best, axis=1)[:, tree.places]
        tokens = mx.concatenate([roots[:, None], tokens], axis=1).astype(mx.int32)
        parents, depths, scores = (
            mx.broadcast_to(x, tokens.shape) for x in (tree.parents, tree.depths, tree.scores)
        )
        return Draft(tokens, parents, depths, scores, tree.heads)

    def _logits(
        self,
        hidden: Float[mx.array, " D"],
        taps: Float[mx.array, "T D"] | None,
        length: int,
        noise: Float[mx.array, "_ V"] | None,
    ) -> Float[mx.array, "L K"]:
        """Return what the first heads say, sharpened and in float32, after the noise is added."""
        x = self._stacks.features(self.network.joined(hidden, taps), length)
        return self._sharpened(
            self._stacks.all_logits(x), None if noise is None else noise[:length]
        )

    def _sharpened(
        self, logits: Float[mx.array, "R K"], noise: Float[mx.array, "R V"] | None
    ) -> Float[mx.array, "R K"]:
        logits = logits.astype(mx.float32)
        if noise is not None:
            ids = self.network.get("token_ids")
            logits = logits + (
                noise[:, : self.config.vocab_size] if ids is None else mx.take(noise, ids, axis=1)
            )
        return self.config.sharpness * logits

    def _tokens(self, columns: Integer[mx.array, "..."]) -> Integer[mx.array, "..."]:
        """Return what columns of the logits stand for."""
        ids = self.network.get("token_ids")
        return (columns if ids is None else ids[columns]).astype(mx.uint32)


@lru_cache(maxsize=16)
def _static_tree(rates: tuple[tuple[float, ...], ...], num_nodes: int) -> StaticTree:
    return StaticTree.of(rates, num_nodes)


class Stacks:
    """All heads' blocks side by side, so that each layer of them is one product.

    The network's own arrays become parts of the stacks: nothing is in memory twice.

    Args:
        network: The heads; they do not change any more.
    """

    def __init__(self, network: MedusaHeads):
        layers = range(network.config.num_draft_layers)
        linears = [[blocks[layer].linear for blocks in network.blocks] for layer in layers]
        self.layers = [(stacked(row, "weight"), stacked(row, "bias")) for row in linears]
        self.own = None if network.config.shared_head else stacked(network.lm_head, "weight")
        self.shared = network.head

    def features(self, hidden: Float[mx.array, " D"], count: int) -> Float[mx.array, "H D"]:
        """Return what the first heads make logits of."""
        x = mx.broadcast_to(hidden, (count, 1, hidden.size))
        for weight, bias in self.layers:
            product = mx.addmm(bias[:count, None], x, weight[:count].swapaxes(1, 2))
            x = x + nn.silu(product)
        return x.squeeze(1)

    def all_logits(self, x: Float[mx.array, "H D"]) -> Float[mx.array, "H K"]:
        """Return the logits of the first heads, each of its own row."""
        if self.own is None:
            return self.shared(x)
        return (x[:, None] @ self.own[: x.shape[0]].swapaxes(1, 2)).squeeze(1)

    def logits(self, x: Float[mx.array, "S D"], number: int) -> Float[mx.array, "S K"]:
        """Return one head's logits of many rows."""
        return self.shared(x) if self.own is None else x @ self.own[number].T


def stacked(modules: Sequence[nn.Module], name: str) -> Float[mx.array, "H ..."]:
    """Return one array of several modules, which get their parts of it back."""
    whole = mx.stack([module[name] for module in modules])
    mx.eval(whole)
    for module, part in zip(modules, whole, strict=True):
        module[name] = part
    mx.eval([module[name] for module in modules])
    return whole
