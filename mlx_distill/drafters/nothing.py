"""The drafter that says nothing: for texts that share calls with others and are decoded plainly."""

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.core.draft import Draft
from mlx_distill.drafters.protocol import DraftPlan, Features


class NoDrafter:
    """A ``Drafter``, and the state of its texts, without a word."""

    taps: tuple[int, ...] = ()

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "NoDrafter":
        """Return a state; all are alike."""
        return self

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return None: nothing is worth verifying."""
        return None

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Look at nothing."""

    def rewind(self, num_tokens: int) -> None:
        """Forget nothing."""


class NoPlanner:
    """A ``Planner`` that parks."""

    def shape(self, text: int, outcome: object) -> DraftPlan | None:
        """Return None: every token is decoded plainly."""
        return None
