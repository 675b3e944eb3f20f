"""The planner: the shape of draft with the most tokens per second, or none where none pays.

    tokens(shape) / seconds(shape)   against   1 / seconds(plain step)

``Costs`` knows the seconds, ``Acceptance`` the tokens; both change with the text, so the choice is
made again every few cycles. Four things keep it calm and safe:

* What cycles and plain steps take while a text is written corrects what was measured beforehand
  (``Pace``). Where everything is drafted for, a few steps are made plainly now and then, to know.
* A shape is left for another only if that promises clearly more, and few shapes are ever used:
  each is compiled at its first use.
* An account of every text: what drafting gained and lost against plain steps so far. A draft is
  made only if the text would still be within a few percent of plain decoding should nothing of it
  be accepted. So a useless drafter costs at most those few percent.
* Where nothing pays, the text is parked: decoded plainly. It is tried again now and then, more and
  more rarely, for acceptance changes within a text. A text that follows a parked one waits, too,
  before it is first tried, and the longer, the more of them came to nothing; what was written
  plainly in the others counts, so that short texts are tried as often as long ones. A trial of a
  drafter that has never proved itself is over as soon as its first drafts come to nothing.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_distill.drafters.protocol import DraftPlan, Outcome
from mlx_distill.speculation.acceptance import Acceptance
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.pace import Pace

# In plain steps: what a text may lose by drafts in vain, of every token, counted from the first
# with so many in advance. One percent is left for the planner's own work and what it cannot see.
LOSS, IN_ADVANCE = 0.015, 64
# What a drafter that has proved itself may lose beyond that: the more, the more it gains, for even
# in good texts there are bad passages. It has after so many cycles, in the texts so far; while they
# are fewer, what it gained on the text that the costs were measured on counts so much.
TRUST, MOST_TRUST, PROVED_CYCLES, PROMISED = 6.0, 6.0, 40, 0.7
# A single draft takes no more than this of what may be lost, if one shape is that cheap.
CAREFUL = 1 / 3
# What was gained long ago may not all be lost again.
MOST_CREDIT = 6.0
# Another shape has to promise so much more, and one that was never used so much more again; but
# once so many are in use, a further one as much as this.
CLEARLY, NEW_SHAPE, FURTHER_SHAPE, MANY_SHAPES = 1.015, 1.01, 1.1, 8
# Widths and lengths that were not measured are chosen, too, up to this one.
MOST_BETWEEN = 4
# Cycles between two choices, and those that a trial has.
CYCLES, TRIAL = 8, 5
# After so many timed cycles without a plain step some are made, to know what they take: at first,
# and it is doubled every time. So many are made; the first, behind a draft, tells nothing.
FIRST_LOOK, LAST_LOOK, LOOKS = 3, 384, 3
# Tokens until a parked text is tried again, at first and at last; it is doubled every time.
FIRST_WAIT, LAST_WAIT = 8, 128
# A text that follows a parked one waits as long as that one would have, but no longer than the
# first of these; with every further text that is parked the wait is doubled, up to the second. So
# does the first text, where next to nothing of the default shape's drafts was accepted while the
# costs were measured: a cycle brought less than so many tokens. What was written plainly in texts
# before counts. Where drafts have ever paid, these waits are only this share as long.
AT_FIRST, MOST_AT_FIRST, NEXT_TO_NOTHING, ONCE_PAID = 32, 128, 1.1, 1 / 4
# A trial of a drafter that has not proved itself is over after so many drafts in vain.
IN_VAIN = 2
# What a trial finds weighs against so many cycles of what was known before; a new text begins with
# so many of the others'.
OLD_CYCLES, OTHERS_CYCLES = 6.0, 80.0
TEXTS = 64  # that are remembered


@dataclass(frozen=True)
class Shape:
    """A shape that was chosen.

    Args:
        plan: It.
        place: Of it in the planner's tables.
        price: Of a cycle, in plain steps.
        foretold: The same before it was corrected.
    """

    plan: DraftPlan
    place: tuple[int, int, int]
    price: float
    foretold: float


@dataclass
class TextState:
    """What the planner knows of a text.

    Args:
        acceptance: Of its drafts.
        context: How many tokens the target has read.
        tokens: How many were written.
        trust: Plain steps that it may lose beyond the few percent; None if nobody has asked yet.
        balance: Plain steps that drafting has saved so far, less those it cost.
        shape: In use; None while the text is parked.
        cycles: Until the next choice.
        at_first: Tokens that are written plainly before anything is drafted, in texts before, too.
        goes_on: Whether a trial does that the text before was too short for.
        was_tried: Whether anything was drafted, or was to be.
        wait: Tokens of the next pause.
        resume: When the parked text is tried again, in tokens.
        waiting: Whether it is parked only until it is known what the draft under way came to.
        asked: The latest two: the next outcome is that of the first.
        seen: The latest outcome.
        looks: Plain steps that are still to be made to know what they take.
        parked: How many of the latest outcomes were plain steps.
        in_vain: Drafts of which nothing was accepted, since it is tried; None once something was.
    """

    acceptance: Acceptance
    context: int = 0
    tokens: int = 0
    trust: float | None = None
    balance: float = 0.0
    shape: Shape | None = None
    cycles: int = 0
    at_first: int = 0
    goes_on: bool = False
    was_tried: bool = False
    wait: int = FIRST_WAIT
    resume: int = 0
    waiting: bool = False
    asked: deque[Shape | None] = field(default_factory=lambda: deque((None, None), 2))
    seen: Outcome | None = None
    looks: int = 0
    parked: int = 0
    in_vain: int | None = 0

    @property
    def is_parked(self) -> bool:
        """Whether it is, so that what its latest steps took is known and nothing is under way."""
        asked = any(self.asked) or self.shape or self.waiting or self.looks
        return not asked and self.parked > 1

    @property
    def under_way(self) -> float:
        """What the draft that nothing is known of yet may still lose, in plain steps."""
        return self.asked[-1].price - 1 if self.asked[-1] else 0.0

    @property
    def budget(self) -> float:
        """What the next draft may lose, in plain steps, if the one under way comes to nothing."""
        advance = LOSS * max(IN_ADVANCE, self.tokens) + (self.trust or 0.0)
        return advance + self.balance - self.under_way

    def park(self, tokens: int) -> None:
        """Decode plainly for so many tokens."""
        self.shape, self.waiting, self.resume = None, False, self.tokens + tokens


class AdaptivePlanner:
    """A ``Planner`` that weighs what a shape costs against what it is worth.

    One planner serves all texts of a model and a drafter: a text starts with what was learned from
    the others.

    Args:
        costs: Of the machine, the model and the drafter.
        batch: Texts that share a call of the target.
        doubt: Is called, once, if the costs turn out to be those of a busier machine.
    """

    def __init__(self, costs: Costs, batch: int = 1, doubt: Callable[[], None] | None = None):
        self.costs = costs
        self.batch = batch
        self._doubt = doubt
        most = costs.rows[-1] // batch
        self.nodes = np.array([n for n in costs.rows if 1 < n <= most], np.int32)
        self.widths, self.lengths = (_filled(x) for x in (costs.widths, costs.lengths))
        self._rest_s = np.array([[costs.rest(w, n) for w in self.widths] for n in self.lengths])
        longest = np.minimum(np.array(self.lengths)[:, None, None], self.nodes - 1)
        self._most_tokens = np.repeat(longest + 1, len(self.widths), axis=1)
        self._used = np.zeros(self._most_tokens.shape, np.bool_)
        size = int(max(self.nodes, default=1))
        self._known = Acceptance(self.lengths, self.widths, size)
        # Tokens until a new text is tried: none, if the text that chose last is drafted for.
        brought = max(costs.cycle_tokens, costs.sampled_cycle_tokens)  # few cycles may mislead
        self._wait = AT_FIRST if 0 < brought < NEXT_TO_NOTHING else 0
        self._has_paid = False  # drafts, in any text so far
        # The latest text, where its first drafts were some good and it may have ended then.
        self._tried: TextState | None = None
        self._plain_tokens = 0  # since anything was drafted, in all texts
        self._pace = Pace()
        self._look_after, self._unseen = FIRST_LOOK, 0  # timed drafts, also since a plain step
        self._texts: OrderedDict[int, TextState] = OrderedDict()

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the shape of a text's next draft; None parks."""
        state = self._heard(text, outcome)
        if self.nodes.size:
            self._choose(state)
        state.asked.append(state.shape)
        return state.shape.plan if state.shape else None

    def rest(self, text: int, outcome: Outcome | None) -> int:
        """Return how many plain steps follow the one under way; see ``Rests``."""
        state = self._heard(text, outcome)
        if not state.is_parked or self._unseen >= self._look_after:
            return 0
        return self._until_tried(state)

    def rested(self, text: int, steps: int, seconds: float | None) -> None:
        """Take in that so many steps were made; many texts later, theirs may be forgotten."""
        state = self._texts.get(text)
        if state is None:
            return
        state.tokens += steps
        state.context += steps
        state.parked += steps
        self._plain_tokens += steps
        if seconds is not None:
            self._learn_step(seconds / steps, state.context)

    @property
    def is_parked(self) -> bool:
        """Whether nothing pays in the latest text, so that those after it may have to wait."""
        return self._wait > 0

    def _heard(self, text: int, outcome: Outcome | None) -> TextState:
        """Return what is known of a text, its latest outcome taken in."""
        state = self._state(text, outcome)
        if outcome is not None and outcome is not state.seen:
            self._learn(state, outcome)
        return state

    def _state(self, text: int, outcome: Outcome | None) -> TextState:
        """Return what is known of a text; a new one starts with what others came to.

        A text that has no outcome any more is another one of the same number.
        """
        state = self._texts.get(text)
        if state is None or (outcome is None and state.seen is not None):
            known, wait = self._known.copy(OTHERS_CYCLES), self._wait
            state = TextState(known, at_first=wait, wait=max(FIRST_WAIT, wait))
            if self._tried is not None:
                # What a shorter text lost in advance may not be lost again.
                left = max(0.0, 1 - self._tried.tokens / IN_ADVANCE)
                state.goes_on, state.balance = True, left * min(0.0, self._tried.balance)
            self._pace.another_text()
            self._texts[text] = state
            if len(self._texts) > TEXTS:
                self._texts.popitem(last=False)
        return state

    def _learn(self, state: TextState, outcome: Outcome) -> None:
        """Take in what became of a draft."""
        state.seen = outcome
        gained, size = outcome.num_accepted + 1, len(outcome.parents)
        state.tokens += gained
        state.context = outcome.cached_tokens + gained
        asked = state.asked[0] or state.asked[1]
        self._plain_tokens = self._plain_tokens + 1 if size == 1 else 0
        if size == 1 or asked is None:
            self._learn_plain(state, outcome.seconds)
            return
        price = self._price(state, asked, size, outcome.seconds)
        state.balance = min(state.balance + gained - price, MOST_CREDIT)
        state.acceptance.learn(asked.plan, outcome.parents, outcome.path, outcome.ranks)
        self._known = state.acceptance
        if outcome.num_accepted:
            state.in_vain = None
        elif state.in_vain is not None:
            state.in_vain += 1
        hopeful = state.in_vain is None and (state.shape is not None or state.waiting)
        self._tried = state if hopeful else None

    def _price(self, state: TextState, asked: Shape, size: int, seconds: float | None) -> float:
        """Return what a cycle took, in plain steps.

        Much of the first one behind plain steps may have been done in the time of the last of
        those, for they are launched ahead.
        """
        foretold, first = asked.foretold, state.parked > 0
        state.parked = 0
        if size != asked.plan.nodes:
            cycle = self.costs.cycle(asked.plan, size, state.context, self.batch)
            foretold = cycle / self.costs.plain(state.context, self.batch)
        if seconds is None:
            return self._pace.price(foretold)
        self._unseen += 1
        took = self._in_steps(seconds, state.context)
        return self._pace.steps(took) if first else self._pace.learn(foretold, took)

    def _learn_plain(self, state: TextState, seconds: float | None) -> None:
        """Take in a plain step; one behind a draft has nothing to overlap with, and takes longer.

        So does one for which the drafter was asked in vain, and one before a draft.
        """
        alone = state.asked[0] is None
        state.parked = state.parked + 1 if alone else 0
        if seconds is None:
            return
        if state.parked > 1 and state.asked[1] is None:
            self._learn_step(seconds, state.context)
        elif self._unseen or state.asked[1] is not None:
            state.balance += 1 - self._pace.steps(self._in_steps(seconds, state.context))

    def _learn_step(self, seconds: float, context: int) -> None:
        """Take in a plain step; beyond the contexts that were measured nothing is doubted."""
        self._pace.learn(1.0, self._in_steps(seconds, context))
        self._unseen = 0
        measured = context <= self.costs.contexts[-1]
        if self._doubt is not None and measured and self._pace.was_crowded:
            self._doubt()
            self._doubt = None

    def _in_steps(self, seconds: float, context: int) -> float:
        return seconds / self.costs.plain(context, self.batch)

    def _choose(self, state: TextState) -> None:
        """Decide what shape the next cycle has."""
        if self._unseen >= self._look_after:
            self._unseen, self._look_after = 0, min(2 * self._look_after, LAST_LOOK)
            state.looks = LOOKS
        if state.looks:
            state.looks, state.shape, state.waiting = state.looks - 1, None, True
            return
        if state.shape is None and not state.waiting:
            if self._until_tried(state) <= 0:
                self._try(state)
            return
        if state.in_vain is not None and state.in_vain >= IN_VAIN and not state.trust:
            self._park(state)
            return
        state.cycles -= 1
        if state.shape and state.cycles > 0 and state.shape.price - 1 <= state.budget:
            return
        state.shape = self._best(state, 1 + self._caution)
        # What is dear may be unaffordable just because the draft before it has no outcome yet.
        state.waiting = state.shape is None and state.under_way > 0
        if state.waiting:
            return
        if state.shape is None:
            self._park(state)
            return
        self._wait, state.wait = 0, FIRST_WAIT
        self._has_paid |= state.acceptance.cycles >= PROVED_CYCLES
        state.cycles = CYCLES

    def _until_tried(self, state: TextState) -> int:
        """Return in how many tokens a parked text is tried; at first, others' count, too."""
        if state.was_tried:
            return state.resume - state.tokens
        return 0 if state.goes_on else state.at_first - self._plain_tokens

    def _park(self, state: TextState) -> None:
        """Decode plainly for a while, in the texts that follow, too."""
        share = ONCE_PAID if self._has_paid else 1.0
        others = max(2 * state.at_first, min(state.wait, round(share * AT_FIRST)))
        self._wait = min(others, round(share * MOST_AT_FIRST))
        self._tried = None
        self._wait_on(state)

    def _wait_on(self, state: TextState) -> None:
        """Decode plainly, for longer every time."""
        state.park(state.wait)
        state.wait = min(2 * state.wait, LAST_WAIT)

    def _try(self, state: TextState) -> None:
        """Draft again, whatever is known: what a trial finds weighs more than what was before."""
        if state.was_tried or state.at_first:
            state.acceptance = state.acceptance.copy(OLD_CYCLES)
        state.was_tried, state.in_vain = True, 0
        state.shape = self._best(state, 0.0)
        if state.shape is None and self._can_pay(self._prices(state.context)).any():
            state.park(FIRST_WAIT)  # it may soon be affordable
        elif state.shape is None:
            self._wait_on(state)
        else:
            self._plain_tokens = 0  # others that wait do so from now on
        state.cycles = TRIAL

    @property
    def _caution(self) -> float:
        """How much more than plain decoding a shape has to promise."""
        return min(0.1, self.costs.spread / 2)

    def _best(self, state: TextState, least: float) -> Shape | None:
        """Return the shape with the most tokens per second, or None.

        Args:
            state: The text.
            least: What a shape has to promise, in tokens per plain step's time.
        """
        foretold = self._foretold(state.context)
        prices = self._pace.prices(foretold)
        speeds = state.acceptance.tokens()[..., self.nodes - 1] / prices
        if state.acceptance.cycles >= PROVED_CYCLES:
            state.trust = _trust(float(speeds.max()))
        elif state.trust is None:
            state.trust = PROMISED * _trust(self._promise(state.context))
        budget = state.budget
        possible = self._can_pay(prices) & (speeds >= least) & (prices - 1 <= budget)
        careful = possible & (prices - 1 <= CAREFUL * budget)
        speeds = np.where(careful if careful.any() else possible, speeds, 0)
        new = NEW_SHAPE if self._used.sum() < MANY_SHAPES else FURTHER_SHAPE
        worth = np.where(self._used, speeds, speeds / new)
        if state.shape is not None:
            worth[state.shape.place] *= CLEARLY
        place = np.unravel_index(worth.argmax(), worth.shape)
        return self._shape_at(place, foretold) if worth[place] > 0 else None

    def _can_pay(self, prices: np.ndarray) -> np.ndarray:
        """Return which shapes would pay if every node on their longest path were accepted."""
        return self._most_tokens > prices * (1 + self._caution)

    def _prices(self, context: int) -> np.ndarray:
        return self._pace.prices(self._foretold(context))

    def _promise(self, context: int) -> float:
        """Return the tokens per plain step's time of the text that the costs were measured on."""
        plan = DraftPlan()
        cycle_s = self.costs.cycle(plan, self.batch * plan.nodes, context)
        price = self._pace.price(cycle_s / self.costs.plain(context, self.batch))
        return self.costs.cycle_tokens / price

    def _foretold(self, context: int) -> np.ndarray:
        """Return what a cycle of every shape should take, in plain steps, uncorrected."""
        cycle_s = self.costs.cycles(self._rest_s, self.batch * self.nodes, context)
        return cycle_s / self.costs.plain(context, self.batch)

    def _shape_at(self, place: tuple[np.intp, ...], foretold: np.ndarray) -> Shape:
        self._used[place] = True
        length, width, size = map(int, place)
        plan = DraftPlan(self.widths[width], self.lengths[length], int(self.nodes[size]))
        alone = float(foretold[place])
        return Shape(plan, (length, width, size), self._pace.price(alone), alone)


def _filled(measured: Sequence[int]) -> list[int]:
    """Return the sizes that were measured, and the small ones between them."""
    between = range(measured[0], min(measured[-1], MOST_BETWEEN + 1))
    return sorted({*measured, *between})


def _trust(speed: float) -> float:
    """Return what a drafter with such a speed may lose."""
    return min(MOST_TRUST, TRUST * max(0.0, speed - 1))
