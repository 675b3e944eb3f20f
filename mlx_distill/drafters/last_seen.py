"""The state of a text for drafters that need nothing of it but what the target computed last."""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.core.draft import Draft
from mlx_distill.drafters.protocol import DraftPlan, Features


class LastSeen:
    """One text's state; the context of a draft is the latest thing that the target's head saw.

    Args:
        drafts: Returns the draft of a hidden state, a root, a plan, noise, and taps.
        features: The last of them is what the target computed when it chose the root.
    """

    def __init__(self, drafts: Callable[..., Draft], features: Features):
        self._drafts = drafts
        self.features = features

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft:
        """Return continuations of the root."""
        return self._drafts(self.features.last, root, plan, noise, self.features.last_taps)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Look at the last of the accepted tokens."""
        self.features = features

    def rewind(self, num_tokens: int) -> None:
        """Nothing is remembered, so nothing is forgotten; what is accepted next replaces it."""
