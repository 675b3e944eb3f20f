"""How much to draft for texts that share their calls: by what the calls of this batch took.

The more texts there are, the fewer of a call's rows are free, and whether drafting pays at all
depends on their number, the machine and the texts. So nothing is foretold: plain steps are timed,
now and then a shape is tried for a few cycles, and the one with the most tokens per second stays.

    plain  12 ms for 4 tokens      a step of every text
    4 x 4  21 ms for 9.6 tokens    trees of four nodes: 1.37 times as fast, so they stay
    4 x 8  38 ms for 12 tokens     0.95: not again soon

A shape's nodes are a budget of all texts: those whose drafts are accepted more often get more of
them, the others fewer, or none, where that promises clearly more tokens (``core.shares``). What
a node costs follows from what plain steps and the shape's calls took.

An account bounds what trials may cost: a share of the time so far, as in ``planning``. What was
learned is kept for the next batch of as many texts.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_distill.core.shares import shares
from mlx_distill.drafters.protocol import DraftPlan, Outcome
from mlx_distill.speculation.acceptance import Acceptance

# Few shapes: each is one more to try, and on a GPU one more to compile.
SHAPES = (DraftPlan(2, 2, 3), DraftPlan(3, 3, 4), DraftPlan(4, 4, 8))
# Cycles of a trial; the first of them still waits for what was before it.
TRIAL, SETTLING = 3, 1
# Plain steps before the first trial, and calls that are remembered of each kind.
FIRST_STEPS, MEMORY = 6, 24
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
class Timed:
    """What one shape came to, for so many texts.

    Args:
        seconds: Of its latest cycles.
        tokens: That each of them added to a text.
        wait: Cycles until it is tried again, after it did not pay.
        due: The cycle from which on it may be.
    """

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    wait: int = FIRST_WAIT
    due: int = 0

    @property
    def cycle_s(self) -> float:
        """Seconds of a cycle."""
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        """Tokens of a text per second."""
        return statistics.fmean(self.tokens) / self.cycle_s


class BatchPlanner:
    """A ``Planner`` of all texts of a batch at once, which is told what their calls took.

    Args:
        shapes: What may be drafted.
    """

    def __init__(self, shapes: tuple[DraftPlan, ...] = SHAPES):
        self.shapes = shapes
        self._known: dict[tuple[int, DraftPlan | None], Timed] = {}
        self._now: DraftPlan | None = None
        self._texts = 0
        self._asked: deque[int] = deque(maxlen=1)  # the texts that share a call
        self._budget = Budget(shapes)
        self._left = 0  # cycles of the present choice
        self._skip = SETTLING
        self._cycles, self._elapsed_s, self._balance_s = 0, 0.0, 0.0

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the shape of a text's next draft, its part of all nodes; None parks all texts."""
        self._asked.append(text)
        if self._now is None or len(self._asked) < 2:
            return self._now
        return self._budget.plan(text, outcome, self._now, self._asked, self._price(self._now))

    def observe(self, num_texts: int, tokens: int, seconds: float) -> None:
        """Take in what a call of all texts came to, and choose the next one's shape.

        Args:
            num_texts: That shared it.
            tokens: That it added to all of them.
            seconds: That it took.
        """
        self._cycles += 1
        self._elapsed_s += seconds
        if num_texts != self._texts:
            self._texts, self._asked = num_texts, deque(self._asked, num_texts)
            self._change(self._best())
            return
        self._left -= 1
        self._account(tokens / num_texts, seconds)
        if self._skip:
            self._skip -= 1
            return
        timed = self._timed(self._now)
        timed.seconds.append(seconds)
        timed.tokens.append(tokens / num_texts)
        if self._left <= 0 or self._overdrawn():
            self._choose()

    def gain(self, num_texts: int) -> float | None:
        """Return how many times as fast as plain steps the best shape is; None while not known."""
        plain = self._known.get((num_texts, None))
        if plain is None or len(plain.seconds) < MEMORY:
            return None
        tried = [self._known.get((num_texts, shape)) for shape in self.shapes]
        speeds = [timed.speed for timed in tried if timed is not None and timed.seconds]
        return max([plain.speed, *speeds]) / plain.speed

    def _price(self, shape: DraftPlan) -> float:
        """Return what a node more costs, in the tokens that all could have had in its time."""
        timed, plain = self._timed(shape), self._timed(None)
        if not timed.seconds or not plain.seconds:
            return 0.0
        # The texts' number is in the speed of all and in the nodes that took the time.
        return max(0.0, timed.cycle_s - plain.cycle_s) * timed.speed / (shape.nodes - 1)

    def _account(self, tokens: float, seconds: float) -> None:
        """Take note of what a draft saved against plain steps, or cost."""
        plain = self._timed(None)
        if self._now is not None and plain.seconds:
            gained = tokens * plain.cycle_s - seconds
            most = IN_ADVANCE * LOSS * plain.cycle_s
            self._balance_s = min(self._balance_s + gained, most)

    def _choose(self) -> None:
        """Decide what comes next: what is best, or a trial of what is due."""
        plain, best = self._timed(None), self._best()
        if self._now is not None and best is not self._now:
            timed = self._timed(self._now)
            timed.due, timed.wait = self._cycles + timed.wait, min(2 * timed.wait, LAST_WAIT)
        if len(plain.seconds) >= FIRST_STEPS:
            for shape in self.shapes:
                if shape is not best and self._may_try(shape):
                    self._change(shape, TRIAL)
                    return
        look = best is not None and self._cycles >= plain.due
        if look:
            plain.due = self._cycles + LOOK_AGAIN
        self._change(None if look else best, TRIAL)

    def _may_try(self, shape: DraftPlan) -> bool:
        """Return whether a trial is due, and would not cost too much if nothing came of it."""
        timed, plain_s = self._timed(shape), self._timed(None).cycle_s
        if self._cycles < timed.due:
            return False
        if timed.seconds:
            return self._allowed() >= (TRIAL + SETTLING) * (timed.cycle_s - plain_s)
        if self._texts <= FEW:
            return True
        rows = ROW * self._texts
        dear_s = DEAR * plain_s * (1 + rows * shape.nodes) / (1 + rows)
        return self._allowed() >= UNDER_WAY * (dear_s - plain_s)

    def _allowed(self) -> float:
        """Return the seconds that trials may cost now."""
        plain = self._timed(None)
        step_s = plain.cycle_s if plain.seconds else 0.0
        return LOSS * max(IN_ADVANCE * step_s, self._elapsed_s) + self._balance_s

    def _overdrawn(self) -> bool:
        """Return whether a trial has cost more than it may."""
        return self._now is not None and self._allowed() < 0

    def _best(self) -> DraftPlan | None:
        """Return the shape with the most tokens per second, or None where none pays."""
        plain = self._timed(None)
        if not plain.seconds:
            return None
        tried = [shape for shape in self.shapes if self._timed(shape).seconds]
        best = max(tried, key=lambda shape: self._timed(shape).speed, default=None)
        pays = best is not None and self._timed(best).speed >= CLEARLY * plain.speed
        return best if pays else None

    def _change(self, shape: DraftPlan | None, cycles: int = TRIAL) -> None:
        self._skip = SETTLING if shape is not self._now else 0
        self._now, self._left = shape, cycles + self._skip

    def _timed(self, shape: DraftPlan | None) -> Timed:
        return self._known.setdefault((self._texts, shape), Timed())
