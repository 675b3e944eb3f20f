"""Times of several tasks, made in turn, so that a machine whose speed drifts does not decide."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Clock = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)
# Times itself: what waits for its inputs, or ends with something that is not to be counted, can
# leave that out. Returns seconds.
Task = Callable[[Clock], float]
# Quartiles that lie further apart than this share of the median are not of the task alone.
LOADED = 0.25
FEWEST_ROUNDS = 3
# What nothing that is done afterwards would ever contradict is found out again after so long.
DAY_S = 86_400.0
# One time tells nothing of how far they lie apart: where steps are so slow that there is no second,
# they count as uncertain as may be, and are kept, or every start would take as long.
UNKNOWN_SPREAD = LOADED


@dataclass(frozen=True)
class Times:
    """What a task took.

    Args:
        median_s: The median.
        spread: From the first to the third quartile, as a share of the median.
        count: How often it was timed.
    """

    median_s: float
    spread: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """Return the figures of some times; of two, the spread is how far they lie apart."""
        median = statistics.median(seconds)
        if len(seconds) < 2:
            return cls(median, UNKNOWN_SPREAD, len(seconds))
        few = len(seconds) < FEWEST_ROUNDS
        quartiles = seconds if few else statistics.quantiles(seconds, n=4, method="inclusive")
        low, high = min(quartiles), max(quartiles)
        return cls(median, (high - low) / median if median else 0.0, len(seconds))


def time_in_turn(
    tasks: Mapping[Key, Task],
    rounds: int,
    limit_s: float,
    clock: Clock = time.perf_counter,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    until: float = math.inf,
) -> dict[Key, Times]:
    """Return what each of some tasks takes, as far as there is time for it.

    Every round makes all of them, each time beginning with another; a round before those warms up,
    and counts only for a task that there is no time left for.

    Args:
        tasks: By name, what matters most first; that one is timed in any case.
        rounds: How often each is timed.
        limit_s: After so many seconds there are no more than three rounds, and after twice as many
            none. What warming up takes is not among them: a GPU's kernels may be compiled then.
        clock: Returns the seconds since some time.
        progress: Is handed the rounds, to show them.
        until: When the clock says more, nothing further is begun, not even to warm up.
    """
    warm: dict[Key, float] = {}
    for name, task in tasks.items():
        if not warm or clock() <= until:
            warm[name] = task(clock)
    names = list(warm)
    start = clock()
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    for number in progress(range(rounds)):
        limit = limit_s if number >= FEWEST_ROUNDS else 2 * limit_s
        shift = number * 7 % len(names)
        for name in names[shift:] + names[:shift]:
            if (now := clock()) - start <= limit and now <= until:
                seconds[name].append(tasks[name](clock))
    return {name: Times.of(times or [warm[name]]) for name, times in seconds.items()}


def typical_spread(times: Iterable[Times]) -> float:
    """Return the spread that half of the tasks exceed."""
    return statistics.median(one.spread for one in times)
