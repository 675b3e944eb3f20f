"""What the decoding loop asks of a drafter."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.core.prefix_tree import BeamLevels
from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.errors import InputError


@dataclass(frozen=True)
class DraftPlan:
    """The shape of a draft.

    Args:
        beam_width: Continuations kept at every depth of the beam search.
        draft_length: Drafted tokens per beam; the certain token before them does not count.
        nodes: Tokens the target verifies in one call of a best-first tree, the certain one
            included.
        tree: "best-first" verifies the most probable paths that the search met; "beam" verifies
            the beams themselves, with shared prefixes once.

    Raises:
        InputError: If a number is below 1, or the kind of tree is unknown.
    """

    beam_width: int = 4
    draft_length: int = 4
    nodes: int = 8
    tree: str = "best-first"

    def __post_init__(self) -> None:
        for name in ("beam_width", "draft_length", "nodes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tree not in ("best-first", "beam"):
            raise InputError(f"tree must be best-first or beam, got {self.tree}")

    def for_support(self, support: str) -> "DraftPlan":
        """Return the plan for a target; one that takes chains only gets chains."""
        return replace(self, beam_width=1, tree="best-first") if support == "chain" else self


@runtime_checkable
class Drafter(Protocol):
    """Predicts what the target will write after a token that is certain."""

    def draft(
        self,
        hidden: Float[mx.array, " D"],
        root: Int[mx.array, " 1"],
        plan: DraftPlan,
        sampling: Sampling = GREEDY,
        noise: Float[mx.array, "L V"] | None = None,
    ) -> BeamLevels:
        """Return likely continuations of the root.

        Args:
            hidden: What the target's head saw when it chose the root.
            root: The certain token.
            plan: How wide and how long to search.
            sampling: How the target's tokens are drawn.
            noise: What will be added to the target's shaped logits at each depth; None at
                temperature 0. A drafter is free to look at it.
        """
        ...
