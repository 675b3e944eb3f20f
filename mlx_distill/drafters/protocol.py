"""What the decoding loop asks of a drafter, and of what plans the drafts.

A new kind of drafter is one new file with a ``Drafter`` and its ``DraftState``; the loop knows no
others. ``ngram`` is one without weights.

    state = drafter.open(prompt, features)                 once per text
    draft = state.draft(root, plan, noise)                 once per call of the target
    state.accept(tokens, features)                         what the call made text
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, TypeGuard, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.core.draft import Draft
from mlx_distill.core.verification import Walk
from mlx_distill.kernels.walk import Walked
from mlx_distill.limits import Between, OneOf, check_fields

# More than any call of a target can pay for; a slip of the keyboard would fill the memory.
BeamWidth = Annotated[int, Between(1, 256)]
DraftLength = Annotated[int, Between(1, 64)]

NO_STATIC_TREE = (
    "a static tree is made of Medusa heads whose hit rates were measured, as train_drafter "
    "does; this drafter has none"
)


@dataclass(frozen=True)
class DraftPlan:
    """The shape of a draft.

    Args:
        beam_width: Continuations kept at every depth of the beam search.
        draft_length: Drafted tokens per beam; the certain token before them does not count.
        nodes: Tokens the target verifies in one call of a best-first tree, the certain one
            included.
        tree: "best-first" verifies the most probable paths that the search met; "beam" verifies
            the beams themselves, with shared prefixes once; "static" always the same choices of
            Medusa heads, whichever were right most often.

    Raises:
        InputError: If a number is out of its range, or the kind of tree is unknown.
    """

    beam_width: BeamWidth = 4
    draft_length: DraftLength = 4
    nodes: Annotated[int, Between(1, 1024)] = 8
    tree: Annotated[str, OneOf("best-first", "beam", "static")] = "best-first"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def has_room(self) -> bool:
        """Whether anything beside the certain token would be verified."""
        return self.tree == "beam" or self.nodes > 1

    def for_support(self, support: str) -> "DraftPlan":
        """Return the plan for a target; one that takes chains only gets chains."""
        return replace(self, beam_width=1, tree="best-first") if support == "chain" else self


@mx.compile
def beside(parts: list[mx.array]) -> Float[mx.array, "N P D"]:
    """Return the rows of some arrays beside each other, by one operation."""
    numbers = mx.array(np.arange(len(parts))[:, None])
    rows = parts[0][:, None]
    for number, part in enumerate(parts[1:], start=1):
        rows = mx.where(numbers == number, part[:, None], rows)
    return rows


def seen_in_rows(
    states: Float[mx.array, "N D"], taps: Sequence[Float[mx.array, "N _"]]
) -> Float[mx.array, "N _"]:
    """Return what a walk takes the last row of for ``Features``: states, and taps behind them.

    A few layers return something wider, which drafters that look at all rows can read.
    """
    alike = taps and all(tap.shape == states.shape for tap in taps)
    return beside([states, *taps]).flatten(1) if alike else states


@dataclass(frozen=True)
class Features:
    """What the target computed at consecutive tokens of a text.

    Args:
        states: What its head saw at every row of the call that read them.
        walk: Which of the rows are the text's; None if all are.
        taps: The outputs of the layers that the drafter asked for, in its order, at the same rows.
    """

    states: Float[mx.array, "N D"]
    walk: Walk | Walked | None = None
    taps: tuple[Float[mx.array, "N _"], ...] = ()

    @property
    def last(self) -> Float[mx.array, " D"]:
        """What the head saw at the last token, when it chose the next one."""
        if isinstance(self.walk, Walked):
            return self.walk.seen[: self.states.shape[-1]]
        return self.states[-1:].squeeze(0) if self.walk is None else self.states[self.walk.last]

    @property
    def last_taps(self) -> Float[mx.array, "T D"] | None:
        """What the tapped layers returned at the last token; None without any."""
        if not self.taps:
            return None
        width = self.states.shape[-1]
        if isinstance(self.walk, Walked) and self.walk.seen.size > width:
            return self.walk.seen[width:].reshape(len(self.taps), width)
        if self.walk is None:
            rows = [tap[-1:] for tap in self.taps]
        else:
            rows = [tap[self.walk.last][None] for tap in self.taps]
        return beside(rows).squeeze(0)

    @property
    def hidden(self) -> Float[mx.array, "T D"]:
        """What the head saw at each of the tokens; see ``DraftState.accept`` for their number."""
        return self.states if self.walk is None else self.states[self.walk.path]

    @property
    def tapped(self) -> tuple[Float[mx.array, "T _"], ...]:
        """What each tapped layer returned at each of the tokens, as ``hidden``."""
        return self.taps if self.walk is None else tuple(x[self.walk.path] for x in self.taps)

    def rows(self, rows: slice) -> "Features":
        """Return some of the call's rows; no walk."""
        return Features(self.states[rows], None, tuple(tap[rows] for tap in self.taps))

    def then(self, later: "Features", most: int) -> "Features":
        """Return these and later ones of the same text, the last ``most`` of them; no walks."""
        pairs = zip((self.states, *self.taps), (later.states, *later.taps), strict=True)
        states, *taps = (mx.concatenate(list(pair))[-most:] for pair in pairs)
        return Features(states, None, tuple(taps))


@dataclass(frozen=True)
class Outcome:
    """What became of one draft, for a planner.

    Args:
        cached_tokens: Length of the text that the target had read before.
        parents: Of the nodes that were verified; the root alone if nothing was drafted.
        num_accepted: How many of the drafted tokens became text.
        path: The nodes that became text, root first.
        ranks: How many nodes are likelier than each, by its draft; empty where they lie in that
            order.
        seconds: What the cycle took; None where that is not known.
    """

    cached_tokens: int
    parents: tuple[int, ...]
    num_accepted: int
    path: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    seconds: float | None = None


@runtime_checkable
class DraftState(Protocol):
    """A drafter at work on one text."""

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return likely continuations of the root, or None where nothing is worth verifying.

        The loop prunes what is more than the plan asks for.

        Args:
            root: The token that is certain; it follows what was accepted.
            plan: The shape of the draft.
            noise: What will be added to the target's logits at each depth before the best is
                taken; None at temperature 0. A drafter is free to look at it.
        """
        ...

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Take in what the target has read and the text keeps: a root and what followed it.

        The host may not know yet how much that is. So the arrays are as long as the longest path of
        the draft: the tokens end with -1, and the features with repetitions of the last ones, where
        the path was shorter. Reading them waits for the target.
        """
        ...

    def rewind(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens that were accepted; others may follow."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Predicts what the target will write: weights and settings, one for all texts.

    Attributes:
        taps: Numbers of the target's layers whose outputs it wants to see beside the head's input;
            negative ones count from the last.
    """

    taps: tuple[int, ...]

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> DraftState:
        """Return the state of a new text.

        Args:
            prompt: The tokens before the first root. Where a prompt cache holds an earlier part of
                the text, that is not among them.
            features: Those of the prompt's last tokens: of the last one; with taps, of up to 256;
                of as many as a drafter asks for that ``LooksBack``.
        """
        ...


@runtime_checkable
class DraftsEverywhere(Protocol):
    """A drafter that can draft behind every token of a known text at once, to be judged."""

    def draft_everywhere(
        self,
        roots: Int[mx.array, " S"],
        features: Features,
        plan: DraftPlan,
        noise: Float[mx.array, "N V"] | None = None,
        earlier: int = 0,
    ) -> Draft:
        """Return the drafts of all roots, in fields with an axis for them in front.

        Args:
            roots: Consecutive tokens of a text.
            features: Those of the token before each root.
            plan: The shape of the drafts.
            noise: Row i is added to the target's logits of the token behind root i; there are
                S + L - 1 of them for drafts of length L. None at temperature 0.
            earlier: So many of the roots, the first ones, are not drafted for, and have no noise:
                they are what a drafter that ``LooksBack`` sees of the text before.
        """
        ...


@runtime_checkable
class DraftsTogether(Protocol):
    """A drafter that drafts for several texts at once, in wide products."""

    def draft_together(
        self,
        contexts: Sequence[tuple[mx.array, ...]],
        roots: Int[mx.array, " B"],
        plan: DraftPlan,
        noise: Float[mx.array, "B L V"] | None,
    ) -> Draft:
        """Return the drafts of all roots, in fields with an axis for them in front.

        Args:
            contexts: What the texts' states say of themselves (``SharesDrafts``).
            roots: The tokens that are certain.
            plan: The shape of every draft.
            noise: What will be added to the target's logits behind each root, depth by depth; None
                at temperature 0.
        """
        ...


@runtime_checkable
class SharesDrafts(Protocol):
    """A state whose drafts can be made together with those of other texts.

    Attributes:
        drafter: Makes them.
    """

    drafter: DraftsTogether

    def context(self, root: Int[mx.array, " 1"]) -> tuple[mx.array, ...]:
        """Return what the drafter has to know of the text, whose next token is ``root``."""
        ...


@runtime_checkable
class LooksBack(Protocol):
    """A drafter that says how much of a prompt it wants to see.

    Attributes:
        look_back: How many of the prompt's last tokens it wants the features of, at least 1.
    """

    look_back: int


@runtime_checkable
class Listens(Protocol):
    """A text's state that knows from the text alone whether it may have something to draft."""

    def wakes(self, root: Int[mx.array, " 1"]) -> bool:
        """Return whether something may be drafted behind what the target says to a token.

        Args:
            root: The token, which goes on with the text, and is known.
        """
        ...


@runtime_checkable
class Closes(Protocol):
    """A state that has something to do when its text ends, wherever and however it ends."""

    def close(self) -> None:
        """Leave the text; nothing is asked of this state any more."""
        ...


@runtime_checkable
class Planner(Protocol):
    """Says how much to draft."""

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the shape of a text's next draft; None parks: one token is decoded plainly.

        Args:
            text: Number of the text.
            outcome: What became of its latest draft that was read; None before there is one.
        """
        ...


@runtime_checkable
class Rests(Protocol):
    """A planner that knows for how long nothing will be drafted."""

    def rest(self, text: int, outcome: Outcome | None) -> int:
        """Return how many plain steps follow the one under way, whatever becomes of them.

        Args:
            text: As ``Planner.shape`` takes it.
            outcome: The same.
        """
        ...

    def rested(self, text: int, steps: int, seconds: float | None) -> None:
        """Take in that so many steps were made, the one under way the first of them.

        Args:
            text: Number of the text.
            steps: What ``rest`` said, or less.
            seconds: What they took, all together; None where that is not known.
        """
        ...


@dataclass(frozen=True)
class FixedPlanner:
    """Always the same plan.

    Args:
        plan: The shape of every draft.
    """

    plan: DraftPlan

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the plan."""
        return self.plan


def is_drafter(given: object) -> TypeGuard[Drafter]:
    """Return whether something is a drafter; the class of one is none."""
    return isinstance(given, Drafter) and not isinstance(given, type)


def has_static_tree(drafter: object) -> bool:
    """Return whether a drafter, or the other one of a mixture, can draft static trees."""
    drafter = getattr(drafter, "drafter", drafter)
    return getattr(drafter, "has_static_tree", False)
