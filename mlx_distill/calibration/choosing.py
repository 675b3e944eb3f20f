"""What drafts, where that is left to us: chosen by a trial that is remembered, or still tried.

One file per machine, MLX version, target and drafter, beside the calibrations.
"""

import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Any, TypeVar

from mlx_distill.calibration.automatic import is_on, known_costs, planner_by
from mlx_distill.calibration.crowding import crowding
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import drafter_hash, identity, recall, remember, say
from mlx_distill.calibration.timing import LOADED
from mlx_distill.calibration.trial import Trial, TrialPlanner
from mlx_distill.drafters.auto import NGRAMS, NOTHING, AutoDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan, FixedPlanner, Planner
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner

FORMAT = 3
# What was chosen beside other programs is tried again after so long.
BUSY_S = 600.0
# A shorter text that is parked tells nothing of the choice.
LEAST_TOKENS = 64
# Of n-grams where nothing is known of what they cost: a trial of them waits for no measurement.
UNMEASURED = DraftPlan(beam_width=2, draft_length=3, nodes=4)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """What drafts for a text.

    Args:
        drafter: It; None for plain decoding.
        plan: The shape of the drafts, or who plans them, or a function that returns who does; None
            leaves it to what was measured.
        ended: Is called when the text has ended, however, with what was written of it.
        began: Is called with what writes the text, of which nobody may ever ask for anything.
    """

    drafter: Drafter | None
    plan: DraftPlan | Planner | Callable[[], Planner] | None = None
    ended: Callable[[int], None] = lambda _: None
    began: Callable[[Generator[Any, None, None]], None] = lambda _: None

    def listen(self, responses: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Return what yields what is written."""
        text = self._heard(responses)
        self.began(text)
        return text

    def _heard(self, responses: Generator[Item, None, None]) -> Generator[Item, None, None]:
        count = 0
        try:
            for response in responses:
                count += 1
                yield response
        finally:
            responses.close()
            self.ended(count)


class Choosing:
    """Chooses among the arms of an automatic drafter, for one target and one law.

    Args:
        pair: A model and an ``AutoDrafter``.
        auto: The latter.
        sampled: Whether tokens are drawn, and not the likeliest.
    """

    def __init__(self, pair: Pair, auto: AutoDrafter, sampled: bool):
        self.pair, self.auto, self.sampled = pair, auto, sampled
        self._measured = replace(pair, drafter=auto.first)
        self._known = identity(self._measured) | {
            "trial": FORMAT,
            "sampled": sampled,
            "weights": drafter_hash(auto.first),
        }
        self.trial = self._read() or Trial(tuple(auto.arms))
        self._planners: dict[str, Planner] = {}
        # On trial; one that was refused, or left before it began, keeps no other away.
        self._text: weakref.ref[Generator[Any, None, None]] | None = None
        self._crowded = False  # whether other programs ran beside this trial
        self._looked = self.trial.tokens  # counted when that was looked at
        self._forget_dated()

    def choose(self, alone: bool = True) -> Choice:
        """Return what drafts for the next text.

        Args:
            alone: Whether it is the only one that is written, so that its cycles can be timed.
                Others get the drafter until that was done.
        """
        self._forget_dated()
        arm = self.trial.chosen
        if arm == NOTHING:
            return Choice(None)
        if arm is None and (self._is_trying or not alone):
            return Choice(self.auto.drafter)
        if arm is None:
            return Choice(self.auto, self._trial_planner, self._ended, self._began)
        return Choice(self.auto.arms[arm], partial(self._planner, arm), partial(self._used, arm))

    def sentence(self) -> str:
        """Return what drafts and why, or that it is being tried."""
        if self.trial.chosen is not None:
            return self.trial.sentence(self.auto)
        *arms, last = (self.auto.title(arm) for arm in self.trial.arms)
        return f"{', '.join(arms)} and {last} are tried in turn, to keep the fastest"

    @property
    def _is_trying(self) -> bool:
        text = None if self._text is None else self._text()
        return text is not None and getgeneratorstate(text) != GEN_CLOSED

    def _began(self, text: Generator[Any, None, None]) -> None:
        self._text = weakref.ref(text)

    def _trial_planner(self) -> Planner:
        drafting = [arm for arm in self.trial.arms if arm != NOTHING]
        return TrialPlanner(self.trial, {arm: self._planner(arm) for arm in drafting})

    def _planner(self, arm: str) -> Planner:
        """Return the planner of all texts of an arm."""
        if self.auto.drafter is None and self.trial.chosen is None:
            return FixedPlanner(UNMEASURED)
        if arm not in self._planners:
            costs = _of_ngrams(self._costs) if arm == NGRAMS else self._costs
            self._planners[arm] = planner_by(costs, self._measured, self.sampled)
        return self._planners[arm]

    @cached_property
    def _costs(self) -> Costs:
        """What decoding costs, measured once even where a busy machine's times are not kept."""
        return known_costs(self._measured)

    def _ended(self, count: int) -> None:
        """Take note of what a text brought; choose, if that is enough.

        What other programs had a part in is followed for a while and not remembered.
        """
        self._text = None
        trial = self.trial
        if trial.tokens == self._looked:
            return
        self._looked = trial.tokens
        self._crowded = self._crowded or crowding() > LOADED
        if trial.is_over:
            trial.decide(time.time())
            say(trial.sentence(self.auto))
            self._crowded = self._crowded or trial.is_loaded
        if not self._crowded:
            self._keep()
        elif trial.is_over:
            say("the machine is busy, so this is tried again the next time")

    def _used(self, arm: str, count: int) -> None:
        """Take note of whether the planner of what was chosen has parked a text."""
        planner, before = self._planners.get(arm), self.trial.parked
        if count < LEAST_TOKENS or not isinstance(planner, AdaptivePlanner):
            return
        self.trial.parked = before + 1 if planner.is_parked else 0
        if self.trial.parked != before and not self._crowded:
            self._keep()

    def _forget_dated(self) -> None:
        """Begin anew where it is time to; what is remembered stays until something is found."""
        now, trial = time.time(), self.trial
        waited = self._crowded and trial.chosen is not None and now - trial.when >= BUSY_S
        if waited or trial.is_dated(now):
            self.trial, self._crowded, self._looked = Trial(trial.arms), False, 0

    def _read(self) -> Trial | None:
        arms = tuple(self.auto.arms)
        return recall(self._known, "trial", lambda values: Trial.from_dict(values, arms))

    def _keep(self) -> None:
        remember(self._known, "trial", self.trial.to_dict())


def choosing(pair: Pair, auto: AutoDrafter, sampled: bool) -> Choosing:
    """Return what chooses for a pair: the same one for all of its texts."""
    known: dict[Any, Choosing] = auto.known
    key = id(pair.model), pair.cache, pair.exact_rows, sampled
    if key not in known:
        known[key] = Choosing(pair, auto, sampled)
    return known[key]


def choice(
    pair: Pair,
    auto: AutoDrafter,
    sampled: bool,
    plan: DraftPlan | Planner | None = None,
    alone: bool = True,
) -> Choice:
    """Return what drafts for the next text of a pair.

    Where nothing is to be measured, or the shape of the drafts is asked for, it is the drafter.

    Args:
        pair: A model and its ``AutoDrafter``.
        auto: The latter.
        sampled: Whether tokens are drawn, and not the likeliest.
        plan: What is asked for.
        alone: Whether it is the only text that is written.
    """
    if pair.target.support == "none":
        return Choice(None)
    if not is_on() or plan is not None:
        return Choice(auto.drafter, plan)
    return choosing(pair, auto, sampled).choose(alone)


def _of_ngrams(costs: Costs) -> Costs:
    """Return the costs of a draft that nobody has to compute."""
    return replace(costs, draft_s=tuple((0.0,) * len(row) for row in costs.draft_s))
