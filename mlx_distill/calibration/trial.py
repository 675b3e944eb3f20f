"""Which way to draft is fastest for a target, tried on the texts that its user has written anyway.

    both, both, both ... | plain, plain ... | drafter, drafter ... | n-grams ... | both ...

The ways take turns of some tokens within a text, so that all of them have the same text to write,
the same context and the same machine. None changes what is written, so a trial costs at most some
speed, and nobody waits for it. What counts is what a turn brought per second.

Sixty tokens tell ways apart that differ by a third, not those that differ by a tenth. So when some
are known of each, those that are clearly behind the best have no further turns, and the others
go on until one is left, or many are known.
"""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.calibration.timing import DAY_S, Clock, Times
from mlx_distill.drafters.auto import NOTHING, ArmPlan, AutoDrafter
from mlx_distill.drafters.protocol import DraftPlan, Outcome, Planner
from mlx_distill.errors import InputError
from mlx_distill.limits import is_finite

# Tokens of a turn, those that are to be counted of every way, and of ways that are near the best.
TURN, COUNTED, MOST = 32, 64, 512
# Nearer than so many standard errors of their difference, two speeds may as well be the other way.
APART = 2.0
# A turn begins with so many plain steps, so that no draft is under way that another has made; what
# it brings is counted from a later call on, when one that it made itself has been read.
PLAIN_STEPS, STEADY = 2, 4
# Another way than the one that suits most texts has to be so much faster, and any so much faster
# than plain decoding.
CLEARLY = 1.03
# What takes longer than so many median cycles was not of the cycle: a compiler, or a caller.
LONGEST = 3.0
# What drafts is tried again when so many texts in a row were parked.
MOST_PARKED = 3
# Quartiles of steps that are all alike lie further apart than this where other programs run.
BUSY = 0.5

_numbers = itertools.count()


@dataclass
class Trial:
    """What was found so far.

    Args:
        arms: What is tried, the one that suits most texts first, plain decoding last.
        cycles: Of each the seconds and the tokens of every cycle that counts.
        chosen: The best; None while that is not known.
        when: That was chosen, in seconds of the calendar.
        parked: How many texts in a row the planner has then parked, though it was to draft.
    """

    arms: tuple[str, ...]
    cycles: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    chosen: str | None = None
    when: float = 0.0
    parked: int = 0

    def __post_init__(self) -> None:
        self.cycles = {arm: self.cycles.get(arm, []) for arm in self.arms}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arms: Sequence[str]) -> "Trial":
        """Return what ``to_dict`` made a dictionary of.

        Raises:
            InputError: If it is of other arms, or holds no times.
        """
        cycles, chosen = values.get("cycles"), values.get("chosen")
        if not isinstance(cycles, dict) or tuple(cycles) != tuple(arms):
            raise InputError("it holds a trial of something else")
        known = [one for arm in arms for one in _list(cycles[arm])]
        if not all(_is_cycle(one) for one in known) or chosen not in (None, *arms):
            raise InputError("it holds no trial")
        found = {arm: [(float(s), n) for s, n in cycles[arm]] for arm in arms}
        when, parked = values.get("when"), values.get("parked")
        trial = cls(tuple(arms), found, chosen, _number(when), _number(parked))
        if chosen is not None and not trial.is_over:
            raise InputError("it holds no trial")
        return trial

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON holds it."""
        names = ("cycles", "chosen", "when", "parked")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return sum(map(self.tokens_of, self.arms))

    def tokens_of(self, arm: str) -> int:
        """Return how many tokens were counted of an arm."""
        return sum(tokens for _, tokens in self.cycles[arm])

    @property
    def open(self) -> list[str]:
        """Return the arms of which more is to be known."""
        if little := self._unknown():
            return little
        rivals = self._rivals()
        return [arm for arm in rivals if len(rivals) > 1 and self.tokens_of(arm) < MOST]

    @property
    def is_over(self) -> bool:
        """Whether enough is known."""
        return not self.open

    def _unknown(self) -> list[str]:
        """Return the arms that little is known of."""
        return [arm for arm in self.arms if self.tokens_of(arm) < COUNTED]

    def _rivals(self) -> list[str]:
        """Return the arms that may be the fastest, as far as errors tell."""
        fastest = max(self.arms, key=self.speed)

        def behind(arm: str) -> float:
            return (self.speed(fastest) - self.speed(arm)) / math.hypot(
                self.error(fastest), self.error(arm), 1e-9 * self.speed(fastest)
            )

        return [arm for arm in self.arms if behind(arm) <= APART]

    @property
    def is_loaded(self) -> bool:
        """Whether steps that are all alike took so different times that other programs ran."""
        return Times.of([seconds for seconds, _ in self.cycles[NOTHING]]).spread > BUSY

    def following(self) -> str:
        """Return the arm whose turn it is: the open one that least is known of, else the best."""
        found = self.open
        return min(found, key=self.tokens_of) if found else self.best

    def speed(self, arm: str) -> float:
        """Return the tokens per second of an arm."""
        return self.tokens_of(arm) / sum(self._seconds(arm))

    def error(self, arm: str) -> float:
        """Return the standard error of an arm's speed, a ratio of sums over its cycles."""
        seconds, speed = self._seconds(arm), self.speed(arm)
        cycles = zip(seconds, self.cycles[arm], strict=True)
        off = sum((tokens - speed * one) ** 2 for one, (_, tokens) in cycles)
        return math.sqrt(off) / sum(seconds)

    def _seconds(self, arm: str) -> list[float]:
        seconds = [one for one, _ in self.cycles[arm]]
        most = LONGEST * statistics.median(seconds)
        return [min(one, most) for one in seconds]

    def speedup(self, arm: str) -> float:
        """Return an arm's share of plain decoding's speed."""
        return self.speed(arm) / self.speed(NOTHING)

    def is_dated(self, now: float) -> bool:
        """Whether what was chosen is to be found out anew.

        Where nothing drafts, nothing would ever tell that it pays by now; what drafts is
        contradicted by texts that are parked.
        """
        if self.chosen == NOTHING:
            return not 0 <= now - self.when < DAY_S
        return self.parked >= MOST_PARKED

    @property
    def best(self) -> str:
        """Return the best arm, by what is known; of little, the one that suits most texts."""
        best = self.arms[0]
        if self._unknown():
            return best
        for arm in self.arms[1:]:
            if arm != NOTHING and self.speed(arm) > CLEARLY * self.speed(best):
                best = arm
        return best if self.speedup(best) >= CLEARLY else NOTHING

    def decide(self, now: float) -> str:
        """Choose the best arm."""
        self.when, self.chosen = now, self.best
        return self.chosen

    def sentence(self, auto: AutoDrafter) -> str:
        """Return what was chosen and why."""
        assert self.chosen is not None
        drafting = [arm for arm in self.arms if arm != NOTHING]
        parts = [f"{auto.title(arm)} {self.speedup(arm):.2f}" for arm in drafting]
        trial = f"in a trial of {self.tokens} tokens"
        if self.chosen == NOTHING:
            return f"nothing drafts here: of plain decoding's speed, {trial}, {', '.join(parts)}"
        rest = [part for arm, part in zip(drafting, parts, strict=True) if arm != self.chosen]
        found = f"{self.speedup(self.chosen):.2f} of plain decoding's speed {trial}"
        return f"drafting with {auto.title(self.chosen)}: {'; '.join([found, *rest])}"


class TrialPlanner:
    """A ``Planner`` of one text that lets the arms of a trial take turns.

    Args:
        trial: What is found is noted there.
        planners: Of the arms that draft.
        clock: Returns the seconds since some time.
    """

    def __init__(
        self, trial: Trial, planners: Mapping[str, Planner], clock: Clock = time.perf_counter
    ):
        self.trial, self.clock = trial, clock
        self._planners = {arm: (planners[arm], next(_numbers)) for arm in planners}
        self._arm = trial.following()
        self._calls = self._tokens = 0  # in this turn
        self._seen: Outcome | None = None
        self._then = 0.0

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        """Return the next draft's shape and the arm that makes it."""
        now = self.clock()
        if outcome is not None and outcome is not self._seen:
            self._count(now - self._then, outcome.num_accepted + 1)
        self._then, self._seen = now, outcome
        if self._tokens >= TURN:
            self._arm = self.trial.following()
            self._calls = self._tokens = 0
        self._calls += 1
        if self._calls <= PLAIN_STEPS or self._arm == NOTHING:
            return None
        planner, number = self._planners[self._arm]
        plan = planner.shape(number, outcome)
        return None if plan is None else ArmPlan.of(plan, self._arm)

    def _count(self, seconds: float, tokens: int) -> None:
        self._tokens += tokens
        if self._calls >= STEADY:
            self.trial.cycles[self._arm].append((seconds, tokens))


def _number(value: Any) -> Any:
    """Return what is a number of at least 0.

    Raises:
        InputError: If it is none.
    """
    if not is_finite(value) or value < 0:
        raise InputError("it holds no trial")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _is_cycle(value: Any) -> bool:
    """Return whether this is a time and a number of tokens."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    seconds, tokens = value
    return is_finite(seconds) and seconds > 0 and type(tokens) is int and 0 < tokens < 2**31
