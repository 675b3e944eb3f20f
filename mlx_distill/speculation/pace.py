"""What steps and cycles really take while a text is written, beside what a calibration foretold.

    a plain step's seconds, as a share of what was foretold   =  c
    a cycle's seconds in plain steps as they were foretold    =  c (1 - a) + d (x + a)

x is what the cycle was foretold to take beyond a plain step, in plain steps, and a a share of one:
where hardly anything was foretold, there is still something that can grow.
c says how much slower the machine is now, d the same of what drafting adds. A machine that others
use, or that is warm, is slower in both; so whatever is seen of one tells of the other, and a long
stretch of drafts without a plain step, or the other way round, is not taken for a change of what
drafting costs.

Source:
    Kalman 1960, A new approach to linear filtering and prediction problems, with c and d as the
    state; what is more than three deviations off counts as three (Huber 1964).
"""

import math

import numpy as np

# Per cycle, as shares: how far both drift together, and what drafting adds by itself. What is too
# dear for long is so by itself: plain steps that nobody sees are not taken to be as slow.
DRIFT, OWN_DRIFT = 0.01, 0.01
# How far one cycle is off by chance; how far c and d are unknown at first, together and apart, and
# how far d is in another text, which has another context.
NOISE, FIRST, FIRST_APART, APART = 0.15, 0.3, 0.3, 0.4
OUTLIER = 3.0
ALWAYS = 0.25  # a
# However it looks, drafting adds no less and no more than this, compared with what was foretold.
LEAST, MOST = 0.5, 4.0
# Other programs only make steps slower: if they surely (by so many deviations) take less than this
# share of what was foretold, they were measured beside some.
CROWDED, SURELY = 0.75, 2.0


class Pace:
    """Follows what steps and cycles take."""

    def __init__(self) -> None:
        self._step = self._more = 1.0  # c and d
        # Their variances, and what they have in common.
        self._step_var = FIRST**2
        self._more_var = FIRST**2 + FIRST_APART**2
        self._both = FIRST**2

    @property
    def more(self) -> float:
        """How many times as much drafting adds to a plain step as was foretold."""
        return min(MOST, max(LEAST, self._more / self._step))

    @property
    def was_crowded(self) -> bool:
        """Whether steps are so much faster than foretold that this was measured beside others."""
        return self._step + SURELY * math.sqrt(self._step_var) < CROWDED

    def another_text(self) -> None:
        """Take note that what follows is another text: what drafts add to its steps may differ."""
        apart = self._more_var - self._both**2 / self._step_var
        self._more_var += max(0.0, (APART * self._more) ** 2 - apart)

    def prices(self, foretold: np.ndarray) -> np.ndarray:
        """Return what cycles take, in plain steps of now; ``foretold`` is in those of then."""
        return np.maximum(1.0, foretold + (self.more - 1) * (foretold - 1 + ALWAYS))

    def price(self, foretold: float) -> float:
        """Return the same of one cycle."""
        return max(1.0, foretold + (self.more - 1) * (foretold - 1 + ALWAYS))

    def steps(self, took: float) -> float:
        """Return what something took in plain steps of now; two if it took longer."""
        return min(2.0, took / self._step)

    def learn(self, foretold: float, took: float) -> float:
        """Take in a cycle, and return what it took in plain steps of now, outliers cut.

        It is never less than one: the machine was faster then.

        Args:
            foretold: What it should have taken, in plain steps; just 1 for a plain step.
            took: What it took, in plain steps as they were foretold.
        """
        self._drift()
        a, x = (1.0, 0.0) if foretold == 1 else (1 - ALWAYS, foretold - 1 + ALWAYS)
        of_step = a * self._step_var + x * self._both
        of_more = a * self._both + x * self._more_var
        expected = a * self._step + x * self._more
        variance = a * of_step + x * of_more + (NOISE * expected) ** 2
        most = OUTLIER * math.sqrt(variance)
        off = min(most, max(-most, took - expected))
        self._step += off * of_step / variance
        self._more += off * of_more / variance
        self._step_var -= of_step * of_step / variance
        self._both -= of_step * of_more / variance
        self._more_var -= of_more * of_more / variance
        self._step, self._more = max(self._step, 0.01), max(self._more, 0.0)
        return max(1.0, (expected + off) / self._step)

    def _drift(self) -> None:
        step, more = DRIFT * self._step, DRIFT * self._more
        self._step_var += step * step
        self._both += step * more
        self._more_var += more * more + (OWN_DRIFT * self._more) ** 2
