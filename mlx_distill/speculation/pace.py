"""What steps and cycles really take while a text is written, beside what a calibration foretold.

    a cycle's seconds / a plain step's, as foretold  =  c + d x

x is what the cycle was foretold to take beyond a plain step, in plain steps; 0 for a plain step.
c says how much slower the machine is now, d the same of what drafting adds. A machine that others
use, or that is warm, is slower in both; so whatever is seen of one tells of the other, and a long
stretch of drafts without a plain step, or the other way round, is not taken for a change of what
drafting costs.

Source:
    Kalman 1960, A new approach to linear filtering and prediction problems, with c and d as the
    state; what is more than three deviations off counts as three (Huber 1964).
"""

import math

# Per cycle, as shares: how far both drift together, and what drafting adds by itself.
DRIFT, OWN_DRIFT = 0.02, 0.003
# How far one cycle is off by chance; how far c and d are unknown at first, together and apart.
NOISE, FIRST, FIRST_APART = 0.15, 0.3, 0.3
OUTLIER = 3.0
# However it looks, drafting adds no less and no more than this, compared with what was foretold.
LEAST, MOST = 0.5, 4.0


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

    def price(self, foretold: float) -> float:
        """Return what a cycle takes, in plain steps of now; ``foretold`` is in those of then."""
        return 1 + self.more * (foretold - 1)

    def steps(self, took: float) -> float:
        """Return what something took in plain steps of now, if it took no more than three."""
        return min(OUTLIER, took / self._step)

    def learn(self, foretold: float, took: float) -> float:
        """Take in a cycle, and return what it took in plain steps of now, outliers cut.

        Args:
            foretold: What it should have taken, in plain steps; 1 for a plain step.
            took: What it took, in plain steps as they were foretold.
        """
        self._drift()
        x = foretold - 1
        of_step, of_more = self._step_var + x * self._both, self._both + x * self._more_var
        expected = self._step + x * self._more
        variance = of_step + x * of_more + (NOISE * expected) ** 2
        most = OUTLIER * math.sqrt(variance)
        off = min(most, max(-most, took - expected))
        self._step += off * of_step / variance
        self._more += off * of_more / variance
        self._step_var -= of_step * of_step / variance
        self._both -= of_step * of_more / variance
        self._more_var -= of_more * of_more / variance
        self._step, self._more = max(self._step, 0.01), max(self._more, 0.0)
        return max(0.0, expected + off) / self._step

    def _drift(self) -> None:
        step, more = DRIFT * self._step, DRIFT * self._more
        self._step_var += step * step
        self._both += step * more
        self._more_var += more * more + (OWN_DRIFT * self._more) ** 2
