"""One text that is decoded with a drafter: what it needs, what is known of it, what it drafts."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.blas.openblas import let_draft
from mlx_distill.core.block_verification import OnceNoise
from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling, TextNoise
from mlx_distill.drafters.protocol import Drafter, DraftPlan, DraftState, Outcome, Planner
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.ledger import Ledger
from mlx_distill.speculation.phases import phase
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.target.target import Target

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class DecodedToken(NamedTuple):
    """One token of the text.

    Args:
        token: Its id.
        logits: What the token was drawn from, in row ``row``: not normalised, but processed. The
            rows are neither taken nor normalised here, since hardly anybody looks at them.
        row: None if these are the log-probabilities themselves.
        from_draft: Whether it was drafted.
    """

    token: int
    logits: Float[mx.array, "..."]
    row: int | None
    from_draft: bool


DecodedTokens: TypeAlias = Generator[DecodedToken, None, None]


@dataclass
class Decoding:
    """One text that is decoded with a drafter: what it needs, and what is known of it.

    Args:
        target: Verifies.
        drafter: Drafts.
        planner: Says how much to draft.
        sampling: How tokens are drawn.
        noise: The text's random numbers; None at temperature 0.
        cache: How keys and values are kept.
        caches: The prompt cache; it may hold earlier turns.
        logits_processors: As mlx-lm's: of the tokens so far and the logits of the next one.
        keep_caches: Whether the caller goes on with the prompt cache, so that it has to hold
            exactly what was handed out.
        max_tokens: The longest answer: nothing is computed for what would follow it.
        text: Number of the text, for the planner.
        positions: How many the target has a learned row for; None where it computes them.
        counters: Counts what happens.
        outcome: What became of the latest draft that was read.
        prompt_tokens: How many tokens the target has read before its answer.
        once: The random numbers of drafts that are drawn from their drafter's own law, and of what
            becomes of them; None where drafts are made in sight of the text's noise.
        is_silent: Whether the drafter was asked the latest time, and had nothing to draft.
    """

    target: Target
    drafter: Drafter
    planner: Planner
    sampling: Sampling
    noise: TextNoise | None
    cache: CacheConfig
    caches: PromptCache
    logits_processors: Sequence[LogitsProcessor] = ()
    keep_caches: bool = False
    max_tokens: int | None = None
    text: int = 0
    positions: int | None = None
    counters: DraftCounters = field(default_factory=DraftCounters)
    outcome: Outcome | None = None
    prompt_tokens: int = 0
    once: OnceNoise | None = None
    is_silent: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.target, self.cache, self.caches)
        self.state: DraftState | None = None  # there is none before the prompt is read

    def rows(self, start: int, count: int) -> Float[mx.array, "N V"] | None:
        """Return the noise of ``count`` tokens from the text's token ``start`` on."""
        return None if self.noise is None else self.noise.rows(start, count)

    def process(
        self, history: Int[mx.array, " T"], logits: Float[mx.array, "1 V"]
    ) -> Float[mx.array, "1 V"]:
        """Return the logits after the processors, as tokens are drawn from them."""
        for processor in self.logits_processors:
            logits = processor(history, logits)
        return self.target.as_drawn(logits)

    def ends_with(self, num_tokens: int) -> bool:
        """Return whether nothing more is asked for when the text has so many tokens."""
        return self.max_tokens is not None and num_tokens >= self.max_tokens

    def plan(self) -> DraftPlan | None:
        """Return the shape of the next draft; None where a token is decoded plainly."""
        plan = self.planner.shape(self.text, self.outcome)
        if plan is None or not plan.has_room:
            return None
        return plan.for_support(self.target.support)

    def draft(
        self,
        root: Int[mx.array, " 1"],
        plan: DraftPlan | None,
        noise: Callable[[int], mx.array | None],
    ) -> PrefixTree | Draft | None:
        """Return continuations of the root, on their way; None where a token is decoded plainly.

        A best-first tree is on its way, too: the device makes it while the host builds the call of
        the target. Whole beams have to be read first.

        Args:
            root: The token that is certain.
            plan: The shape of the draft; None drafts nothing.
            noise: Returns the noise of the first so many tokens after it.
        """
        self.is_silent = False
        let_draft(plan is not None)
        if plan is None:
            return None
        assert self.state is not None
        if self.once is None:
            in_sight = self.in_sight(noise(plan.draft_length))
        else:
            in_sight = self.once.rows(plan.draft_length)
        with phase("draft", root, in_sight) as made:
            draft = self.state.draft(root, plan, in_sight)
            made(draft)
        if draft is None:
            self.is_silent = True
            let_draft(False)  # the plain step that follows is faster with all threads
            return None
        if plan.tree == "beam":
            mx.async_eval(draft.tokens, draft.parents, draft.depths, draft.scores)
            return draft
        chain = plan.beam_width == 1 and self.target.prefers_lines
        with phase("tree") as made:
            tree = (draft.best_chain if chain else draft.best_first)(plan.nodes)
            made(tree)
        mx.async_eval(tree.tokens, tree.parents, tree.mask, tree.depths)
        return tree

    def in_sight(self, noise: mx.array | None) -> mx.array | None:
        """Return what is added to the logits themselves, before the temperature divides them."""
        temperature = self.sampling.temperature
        return noise if noise is None or temperature == 1 else temperature * noise

    def tree(
        self, root: Int[mx.array, " 1"], draft: PrefixTree | Draft | None, start: int
    ) -> PrefixTree:
        """Return the tree to verify; ``start`` is the root's position."""
        if draft is None or not self._reaches(start, draft.max_depth + 1):
            return PrefixTree.root(root)
        if not isinstance(draft, Draft):
            return draft
        with phase("tree", draft) as made:
            tree = PrefixTree.from_beams(draft.beams())
            made(tree)
        return tree

    def _reaches(self, start: int, num_tokens: int) -> bool:
        """Return whether so many more tokens can be read in one call."""
        beyond = self.positions is not None and start + num_tokens > self.positions
        return not beyond and not self.cache.quantizes_within(start, num_tokens)
