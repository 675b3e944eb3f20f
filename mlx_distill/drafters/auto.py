"""Several ways to draft for one target, of which the best is found out by trying them.

    both      n-grams and a drafter in one tree        drafter   the drafter alone
    ngrams    n-grams alone                            nothing   plain decoding

Every text has a state of each of them, so that any can make the next draft. Which one does is said
by the draft's plan.
"""

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.core.draft import Draft
from mlx_distill.drafters.mixture import MixedDrafter, MixedState
from mlx_distill.drafters.ngram import PAIR, NGramDrafter, NGramState
from mlx_distill.drafters.protocol import Closes, Drafter, DraftPlan, DraftState, Features

BOTH, DRAFTER, NGRAMS, NOTHING = "both", "drafter", "ngrams", "nothing"


@dataclass(frozen=True)
class ArmPlan(DraftPlan):
    """The shape of a draft, and what makes it.

    Args:
        arm: One of an ``AutoDrafter``'s.
    """

    arm: str = NOTHING

    @classmethod
    def of(cls, plan: DraftPlan, arm: str) -> "ArmPlan":
        """Return a shape for an arm."""
        return cls(**{one.name: getattr(plan, one.name) for one in fields(DraftPlan)}, arm=arm)


class AutoDrafter:
    """A ``Drafter`` of several, the first of which drafts where a plan names none.

    N-grams store no texts.

    Args:
        drafter: One that fits the target; None leaves n-grams.
        name: Of that drafter, for reports.

    Attributes:
        arms: What can draft, by name; None for nothing. The one that suits most kinds of text is
            the first, the simplest the last.
        first: The first of them.
        known: What was found out about it, for those that choose.
    """

    def __init__(self, drafter: Drafter | None, name: str = "the drafter"):
        self.drafter, self.name = drafter, name
        alone = NGramDrafter(store_tokens=0)
        self.arms: dict[str, Drafter | None] = {NGRAMS: alone, NOTHING: None}
        first: MixedDrafter | NGramDrafter = alone
        if drafter is not None:
            first = MixedDrafter(drafter, NGramDrafter(shortest=PAIR, store_tokens=0))
            self.arms = {BOTH: first, DRAFTER: drafter, **self.arms}
        self.first: MixedDrafter | NGramDrafter = first
        self.alone = alone
        self.known: dict[Any, Any] = {}
        self.taps = first.taps
        self.look_back = getattr(first, "look_back", 1)
        self.target = getattr(drafter, "target", None)
        self.config = getattr(drafter, "config", None)

    def title(self, arm: str) -> str:
        """Return the name of an arm for reports."""
        titles = {
            BOTH: f"n-grams and {self.name}",
            DRAFTER: f"{self.name} alone",
            NGRAMS: "n-grams" if self.drafter is None else "n-grams alone",
            NOTHING: "plain decoding",
        }
        return titles[arm]

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "AutoState":
        """Return the states of all."""
        first = self.first.open(prompt, features)
        alone = self.alone.open(prompt, features) if isinstance(first, MixedState) else first
        return AutoState(first, alone)


class AutoState:
    """A text, as all of them know it.

    Args:
        first: Of n-grams and the drafter, or of n-grams.
        alone: Of n-grams alone.
    """

    def __init__(self, first: MixedState | NGramState, alone: NGramState):
        self._first, self._alone = first, alone
        self._states: list[DraftState] = [first] if first is alone else [first, alone]

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return what the plan's arm has to say."""
        state: DraftState = self._first
        if isinstance(plan, ArmPlan) and plan.arm == NGRAMS:
            state = self._alone
        elif isinstance(plan, ArmPlan) and plan.arm == DRAFTER:
            assert isinstance(self._first, MixedState)
            state = self._first.state
        return state.draft(root, plan, noise)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Tell all."""
        for state in self._states:
            state.accept(tokens, features)

    def rewind(self, num_tokens: int) -> None:
        """Let all forget."""
        for state in self._states:
            state.rewind(num_tokens)

    def close(self) -> None:
        """Let all go."""
        for state in self._states:
            if isinstance(state, Closes):
                state.close()
