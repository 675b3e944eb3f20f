"""N-grams and another drafter, whose drafts are merged in one tree.

The other drafter's draft is on its way before the host looks at what the n-grams have to say. Where
that is nothing, the device has nothing more to do.
"""

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.core.draft import MOST_COMPARED, Draft
from mlx_distill.core.merging import merged
from mlx_distill.drafters.ngram import PAIR, NGramDrafter, NGramState
from mlx_distill.drafters.protocol import (
    Closes,
    Drafter,
    DraftPlan,
    DraftState,
    Features,
    is_drafter,
)
from mlx_distill.errors import InputError


class MixedDrafter:
    """A ``Drafter`` of another one's nodes and of n-grams, by their calibrated scores.

    Args:
        drafter: The other one.
        ngrams: Looked up in the text; those of two tokens, too, without more words.

    Attributes:
        taps: The other one's, as is ``look_back``.
        target: What the other one was made for.
        config: The other one's.
    """

    def __init__(self, drafter: Drafter, ngrams: NGramDrafter | None = None):
        if not is_drafter(drafter):
            raise InputError(f"n-grams are mixed with a drafter, got {drafter!r:.60}")
        if not isinstance(ngrams, NGramDrafter | None):
            raise InputError(f"ngrams must be an NGramDrafter, got {ngrams!r:.60}")
        self.drafter = drafter
        self.ngrams = ngrams or NGramDrafter(shortest=PAIR)
        self.taps = drafter.taps
        self.look_back = getattr(drafter, "look_back", 256 if drafter.taps else 1)
        self.target = getattr(drafter, "target", None)
        self.config = getattr(drafter, "config", None)

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "MixedState":
        """Return the states of both."""
        return MixedState(self.drafter.open(prompt, features), self.ngrams.open(prompt, features))


class MixedState:
    """A text, as two drafters know it.

    Args:
        state: Of the other drafter.
        ngrams: Of the n-grams.
    """

    def __init__(self, state: DraftState, ngrams: NGramState):
        self.state = state
        self.ngrams = ngrams

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return what both have to say; this waits for the root, when the other's is under way."""
        draft = self.state.draft(root, plan, noise)
        if draft is None:
            return self.ngrams.draft(root, plan, noise)
        if draft.tokens.size > MOST_COMPARED:
            return draft
        mx.async_eval(draft.tokens, draft.parents, draft.depths, draft.scores)
        grown = self.ngrams.sprouts(root, plan)
        return draft if grown is None else merged(grown.filled_up(), draft)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Tell both."""
        self.state.accept(tokens, features)
        self.ngrams.accept(tokens, features)

    def rewind(self, num_tokens: int) -> None:
        """Let both forget."""
        self.state.rewind(num_tokens)
        self.ngrams.rewind(num_tokens)

    def close(self) -> None:
        """Let both go."""
        for state in (self.state, self.ngrams):
            if isinstance(state, Closes):
                state.close()
