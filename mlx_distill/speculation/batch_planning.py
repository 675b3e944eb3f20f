"""How much to draft for texts that share their calls: by what calls cost and what was accepted.

The more texts there are, the fewer of a call's rows are free, and whether drafting pays at all
depends on their number, the machine and the texts. A shape has a price, in plain steps of all
texts, and a text gains tokens by it; what gains most per step stays.

    plain  1 step    for 1 token of every text
    4 x 4  1.75      trees of four nodes, 2.4 tokens: 1.37 times as fast, so they stay
    4 x 8  3.2       3 tokens: 0.95, not again soon

The price is the machine's, and may be known from before (``calibration.batches``). Whenever one
shape follows another, it is taken anew from the calls on both sides of the change: never from calls
further apart, between which the machine may have become slower. What is accepted is the texts'.

A shape's nodes are a budget of all texts: those whose drafts are accepted more often get more of
them, the others fewer, or none, where that promises clearly more tokens (``core.shares``). What
a node costs follows from the shape's price.

An account bounds what trials may cost: a share of the time so far, as in ``planning``. What was
learned is kept for the next batch of as many texts.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_distill.core.shares import shares
from mlx_distill.drafters.protocol import DraftPlan, Outcome
from mlx_distill.speculation.acceptance import Acceptance

# Few shapes: each is one more to try, and on a GPU one more to compile.
SHAPES = (DraftPlan(2, 2, 3), DraftPlan(3, 3, 4), DraftPlan(4, 4, 8))
# Cycles of a trial; the first of them still waits for what was before it.
TRIAL, SETTLING = 3, 1
# Plain steps before the first trial, calls that are remembered of each kind, and prices.
FIRST_STEPS, MEMORY, PRICES = 6, 24, 9
# Cycles until a shape that did not pay is tried again, at first and at last.
FIRST_WAIT, LAST_WAIT = 64, 4096
# What trials may cost in vain: of the time so far, counted from the first with so many steps.
LOSS, IN_ADVANCE = 0.015, 64
# What drafting has to promise beyond plain steps, and how often those are timed again meanwhile.
CLEARLY, LOOK_AGAIN = 1.03, 192
# What a further row costs, of a plain step of one text, before a shape was ever tried.
ROW = 0.05
# But it may be so many times as dear, and so many such calls are under way before that is known;
# where few texts share a call, drafting pays too often to wait until that can be afforded.
DEAR, UNDER_WAY, FEW = 2.0, 2, 2
# What was measured elsewhere counts as so many prices, and cycles, found here.
FORETOLD, PROMISED = 6, 8
# What may be lost is so many times as much where drafts have brought so much elsewhere: a few
# cycles of few texts say little.
TRUST, PROVED = 6.0, 1.08
# Nodes that a text may have, and the cycles between two ways to share them. A text that gets none
# keeps so much of what was learned of it each time: it is tried again when that is forgotten.
SIZES, SHARED_FOR, KEPT = (1, 2, 3, 4, 8, 16), 16, 0.9


class Budget:
    """Shares the nodes of a shape among texts, by what was accepted of each one's drafts.

    Args:
        shapes: That may be shared.
    """

    def __init__(self, shapes: Sequence[DraftPlan]):
        self._lengths = sorted({shape.draft_length for shape in shapes})
        self._widths = sorted({shape.beam_width for shape in shapes})
        self._texts: dict[int, Acceptance] = {}
        self._shape: DraftPlan | None = None  # what is shared now, and how
        self._plans: dict[int, DraftPlan] = {}
        self._left = 0  # so often it is asked before that is thought over

    def plan(
        self,
        text: int,
        outcome: Outcome | None,
        shape: DraftPlan,
        texts: Iterable[int],
        price: float,
    ) -> DraftPlan:
        """Return a text's part of a shape's nodes.

        Args:
            text: That asks.
            outcome: Of its draft.
            shape: What each text would have of equal parts.
            texts: All that share a call.
            price: Of a node, in the tokens that all could have had in its time.
        """
        if outcome is not None and len(outcome.parents) > 1 and text in self._texts:
            drafted = self._plans.get(text, shape)
            self._texts[text].learn(drafted, outcome.parents, outcome.path, outcome.ranks)
        self._left -= 1
        if self._left < 0 or shape is not self._shape or text not in self._plans:
            texts = list(dict.fromkeys([*texts, text]))
            self._shape, self._left = shape, SHARED_FOR * len(texts)
            self._plans = self._shared(shape, texts, price)
        return self._plans[text]

    def _shared(self, shape: DraftPlan, texts: Sequence[int], price: float) -> dict[int, DraftPlan]:
        self._texts = {text: self._texts.get(text) or self._unknown() for text in texts}
        row = self._lengths.index(shape.draft_length), self._widths.index(shape.beam_width)
        tokens = np.stack([self._texts[text].tokens()[row] for text in texts])
        worth = tokens - price * np.arange(1, tokens.shape[1] + 1)
        values = worth[:, np.array(SIZES) - 1].tolist()
        found = shares(values, SIZES, shape.nodes * len(texts))
        gain = worth[np.arange(len(texts)), np.array(found) - 1] - worth[:, shape.nodes - 1]
        if gain.sum() < (CLEARLY - 1) * tokens[:, shape.nodes - 1].sum():
            return dict.fromkeys(texts, shape)
        for text, size in zip(texts, found, strict=True):
            if size == 1:
                known = self._texts[text]
                self._texts[text] = known.copy(KEPT * known.cycles)
        return {text: replace(shape, nodes=size) for text, size in zip(texts, found, strict=True)}

    def _unknown(self) -> Acceptance:
        return Acceptance(self._lengths, self._widths, SIZES[-1])


@dataclass
class Known:
    """What is known of one shape, for so many texts.

    Args:
        prices: Of a cycle, in plain steps, as they were found.
        tokens: That each of its latest cycles added to a text.
        promised: The same where the price was measured, of other texts; None if nowhere.
        tried: Cycles that were made here.
        wait: Cycles until it is tried again, after it did not pay.
        due: The cycle from which on it may be.
    """

    prices: deque[float] = field(default_factory=lambda: deque(maxlen=PRICES))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    promised: float | None = None
    tried: int = 0
    wait: int = FIRST_WAIT
    due: int = 0

    @property
    def price(self) -> float | None:
        """What a cycle costs, in plain steps; None while that is not known."""
        return statistics.median(self.prices) if self.prices else None


class BatchPlanner:
    """A ``Planner`` of all texts of a batch at once, which is told what their calls took.

    Args:
        shapes: What may be drafted.
    """

    def __init__(self, shapes: tuple[DraftPlan, ...] = SHAPES):
        self.shapes = shapes
        self._known: dict[tuple[int, DraftPlan], Known] = {}
        self._now: DraftPlan | None = None
        self._before: tuple[DraftPlan | None, float] | None = None  # and what its calls took
        self._texts = 0
        self._asked: deque[int] = deque(maxlen=1)  # the texts that share a call
        self._budget = Budget(shapes)
        self._seconds: deque[float] = deque(maxlen=MEMORY)  # of the present choice
        self._left = 0  # cycles of it
        self._skip = SETTLING
        self._look = 0  # the cycle from which on plain steps are to be made again
        # Plain steps so far, and what drafts have saved of them or cost.
        self._cycles, self._steps, self._balance = 0, 0.0, 0.0

    def begin_with(self, num_texts: int, known: Mapping[DraftPlan, tuple[float, float]]) -> None:
        """Take over what was measured elsewhere, unless something is known of so many texts.

        Args:
            num_texts: That share a call.
            known: Of each shape the price, and the tokens that it adds to a text.
        """
        if any(texts == num_texts for texts, _ in self._known):
            return
        self._look = self._cycles + LOOK_AGAIN
        for shape, (price, tokens) in known.items():
            prices, counted = deque([price] * FORETOLD, PRICES), deque([tokens] * PROMISED, MEMORY)
            self._known[num_texts, shape] = Known(prices, counted, tokens)

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the shape of a text's next draft, its part of all nodes; None parks all texts."""
        self._asked.append(text)
        if self._now is None or len(self._asked) < 2:
            return self._now
        return self._budget.plan(text, outcome, self._now, self._asked, self._row_price(self._now))

    def observe(self, num_texts: int, tokens: int, seconds: float) -> None:
        """Take in what a call of all texts came to, and choose the next one's shape.

        Args:
            num_texts: That shared it.
            tokens: That it added to all of them.
            seconds: That it took.
        """
        self._cycles += 1
        if num_texts != self._texts:
            self._inherit(num_texts)
            self._texts, self._asked = num_texts, deque(self._asked, num_texts)
            self._change(self._best())
            self._before = None
            return
        self._left -= 1
        if self._skip:
            self._steps += 1
            self._skip -= 1
            return
        self._seconds.append(seconds)
        if self._now is None:
            self._steps += 1
        else:
            known = self._of(self._now)
            known.tokens.append(tokens / num_texts)
            known.tried += 1
            self._account(tokens / num_texts, seconds)
        if self._left <= 0 or self._overdrawn():
            self._choose()

    def gain(self, num_texts: int) -> float | None:
        """Return how many times as fast as plain steps the best shape is; None while not known."""
        found = [self._known.get((num_texts, shape)) for shape in self.shapes]
        speeds = [
            self._speed(num_texts, shape)
            for shape, known in zip(self.shapes, found, strict=True)
            if known is not None and known.tried
        ]
        return max([1.0, *speeds]) if speeds and self._cycles >= MEMORY else None

    def _of(self, shape: DraftPlan) -> Known:
        return self._known.setdefault((self._texts, shape), Known())

    def _speed(self, texts: int, shape: DraftPlan) -> float:
        """Return the tokens of a text in the time of a plain step; 0 while not known."""
        known = self._known.get((texts, shape), Known())
        if known.price is None or not known.tokens:
            return 0.0
        tokens = statistics.fmean(known.tokens)
        if not known.tried:  # others say how these texts compare with those of the promise
            tokens = 1 + (tokens - 1) * self._kept(texts)
        return tokens / known.price

    def _kept(self, texts: int) -> float:
        """Return what share of the promised tokens these texts have accepted."""
        known = [self._known.get((texts, shape), Known()) for shape in self.shapes]
        shares = [
            (statistics.fmean(one.tokens) - 1) / (one.promised - 1)
            for one in known
            if one.tried and one.promised is not None and one.promised > 1
        ]
        return statistics.fmean(shares) if shares else 1.0

    def _inherit(self, num_texts: int) -> None:
        """Begin with what is known of the most similar number of texts."""
        others = {texts for texts, _ in self._known}
        if not others or num_texts in others:
            return
        nearest = min(others, key=lambda texts: abs(texts - num_texts))
        for shape in self.shapes:
            known = self._known.get((nearest, shape))
            if known is not None:
                copied = deque(known.prices, PRICES), deque(known.tokens, MEMORY)
                new = Known(*copied, known.promised, known.tried, known.wait, known.due)
                self._known[num_texts, shape] = new

    def _row_price(self, shape: DraftPlan) -> float:
        """Return what a node more costs, in the tokens that all could have had in its time."""
        price = self._of(shape).price
        if price is None:
            return 0.0
        # The texts' number is in the speed of all and in the nodes that took the time.
        speed = self._speed(self._texts, shape)
        return max(0.0, price - 1) * speed / (shape.nodes - 1)

    def _account(self, tokens: float, seconds: float) -> None:
        """Take note of what a draft saved against plain steps, or cost."""
        assert self._now is not None
        price = self._of(self._now).price
        if price is None:
            price = seconds / self._before[1] if self._before else 1.0
        self._steps += price
        self._balance = min(self._balance + tokens - price, IN_ADVANCE * self._loss)

    def _price(self) -> None:
        """Take the price of a shape from the calls before and behind the last change."""
        if self._before is None or len(self._seconds) < TRIAL:
            return
        (shape, before_s), now_s = self._before, statistics.median(self._seconds)
        self._before = None
        if shape is None and self._now is not None:
            self._of(self._now).prices.append(now_s / before_s)
        elif shape is not None and self._now is None:
            self._of(shape).prices.append(before_s / now_s)
        elif shape is not None and self._now is not None:
            known = self._of(shape).price
            if known is not None:
                self._of(self._now).prices.append(known * now_s / before_s)

    def _choose(self) -> None:
        """Decide what comes next: what is best, or a trial of what is due."""
        self._price()
        best = self._best()
        if self._now is not None and best is not self._now:
            known = self._of(self._now)
            known.due, known.wait = self._cycles + known.wait, min(2 * known.wait, LAST_WAIT)
        if self._now is not None or len(self._seconds) >= FIRST_STEPS:
            for shape in self.shapes:
                if shape is not best and self._may_try(shape):
                    self._change(shape, TRIAL)
                    return
        look = best is not None and self._cycles >= self._look
        if look:
            self._look = self._cycles + LOOK_AGAIN
        self._change(None if look else best, TRIAL)

    def _may_try(self, shape: DraftPlan) -> bool:
        """Return whether a trial is due, and would not cost too much if nothing came of it."""
        known = self._of(shape)
        if self._cycles < known.due:
            return False
        if known.price is not None:
            if not known.tried and self._speed(self._texts, shape) < CLEARLY:
                return False  # what it would have to do better than was measured elsewhere
            return self._allowed() >= (TRIAL + SETTLING) * (known.price - 1)
        if self._texts <= FEW:
            return True
        rows = ROW * self._texts
        dear = DEAR * (1 + rows * shape.nodes) / (1 + rows)
        return self._allowed() >= UNDER_WAY * (dear - 1)

    def _allowed(self) -> float:
        """Return the plain steps that trials may cost now."""
        return self._loss * max(IN_ADVANCE, self._steps) + self._balance

    @property
    def _loss(self) -> float:
        """What may be lost of every plain step: more where drafts have proved themselves."""
        known = [self._known.get((self._texts, shape), Known()) for shape in self.shapes]
        gains = [(one.promised or 0) / one.price for one in known if one.price is not None]
        return LOSS * (TRUST if max(gains, default=0.0) >= PROVED else 1)

    def _overdrawn(self) -> bool:
        """Return whether a trial has cost more than it may."""
        return self._now is not None and self._allowed() < 0

    def _best(self) -> DraftPlan | None:
        """Return the shape with the most tokens per second, or None where none pays."""
        speeds = {shape: self._speed(self._texts, shape) for shape in self.shapes}
        if self._now is not None:  # another one has to be clearly faster
            speeds[self._now] *= CLEARLY
        best = max(self.shapes, key=speeds.__getitem__)
        return best if self._speed(self._texts, best) >= CLEARLY else None

    def _change(self, shape: DraftPlan | None, cycles: int = TRIAL) -> None:
        self._left = cycles
        if shape is not self._now:
            if len(self._seconds) >= TRIAL:
                self._before = self._now, statistics.median(self._seconds)
            else:
                self._before = None
            self._seconds.clear()
            self._skip = SETTLING
            self._left += SETTLING
        self._now = shape
