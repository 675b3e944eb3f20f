"""What cycles take, the caller's own time left out."""

import time
from collections.abc import Callable

# The device works on while the caller does. If that takes more than this share of a cycle, how long
# the cycle took is not known.
MOST_AWAY = 0.1


class Stopwatch:
    """Times one cycle after the other.

    Args:
        clock: Returns the seconds since some time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._last: float | None = None
        self._away_s = self._left = 0.0

    def lap(self) -> float | None:
        """Return the seconds since the last lap; None at the first, or if the caller took long."""
        now, last, away_s = self._clock(), self._last, self._away_s
        self._last, self._away_s = now, 0.0
        if last is None or away_s > MOST_AWAY * (now - last):
            return None
        return now - last - away_s

    def away(self) -> "Stopwatch":
        """Leave out what is done within."""
        return self

    def __enter__(self) -> None:
        self._left = self._clock()

    def __exit__(self, *error: object) -> None:
        self._away_s += self._clock() - self._left
