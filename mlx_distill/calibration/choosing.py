"""What drafts, where that is left to us: chosen by a trial that is remembered, or still tried.

One file per machine, MLX version, target and drafter, beside the calibrations.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from mlx_distill.calibration.automatic import is_on, known_costs
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import drafter_hash, identity, recall, remember, say
from mlx_distill.calibration.trial import Trial, TrialPlanner
from mlx_distill.drafters.auto import NGRAMS, NOTHING, AutoDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan, FixedPlanner, Planner
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner

FORMAT = 1
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
        ended: Is called when the text has ended, however.
    """

    drafter: Drafter | None
    plan: DraftPlan | Planner | Callable[[], Planner] | None = None
    ended: Callable[[], None] = lambda: None

    def listen(self, responses: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Yield what is written."""
        try:
            yield from responses
        finally:
            self.ended()


class Choosing:
    """Chooses among the arms of an automatic drafter, for one target and one law.

    Args:
        pair: A model and an ``AutoDrafter``.
        auto: The latter.
        sampled: Whether tokens are drawn, and not the likeliest.
    """

    def __init__(self, pair: Pair, auto: AutoDrafter, sampled: bool):
        self.pair, self.auto, self.sampled = pair, auto, sampled
        measured = replace(pair, drafter=auto.first)
        self._known = identity(measured) | {
            "trial": FORMAT,
            "sampled": sampled,
            "weights": drafter_hash(auto.first),
        }
        self.trial = self._read() or Trial(tuple(auto.arms))
        self._planners: dict[str, Planner] = {}
        self._busy = False

    def choose(self, alone: bool = True) -> Choice:
        """Return what drafts for the next text.

        Args:
            alone: Whether it is the only one that is written, so that its cycles can be timed.
                Others get the drafter until that was done.
        """
        arm = self.trial.chosen
        if arm == NOTHING:
            return Choice(None)
        if arm is None and (self._busy or not alone):
            return Choice(self.auto.drafter)
        if arm is None:
            self._busy = True
            return Choice(self.auto, self._trial_planner, self._ended)
        return Choice(self.auto.arms[arm], partial(self._planner, arm))

    def sentence(self) -> str:
        """Return what drafts and why, or that it is being tried."""
        if self.trial.chosen is not None:
            return self.trial.sentence(self.auto)
        *arms, last = (self.auto.title(arm) for arm in self.trial.arms)
        return f"{', '.join(arms)} and {last} are tried in turn, to keep the fastest"

    def _trial_planner(self) -> Planner:
        drafting = [arm for arm in self.trial.arms if arm != NOTHING]
        return TrialPlanner(self.trial, {arm: self._planner(arm) for arm in drafting})

    def _planner(self, arm: str) -> Planner:
        """Return the planner of all texts of an arm."""
        if self.auto.drafter is None and self.trial.chosen is None:
            return FixedPlanner(UNMEASURED)
        if arm not in self._planners:
            costs = _of_ngrams(self._costs) if arm == NGRAMS else self._costs
            self._planners[arm] = AdaptivePlanner(costs.sampled() if self.sampled else costs)
        return self._planners[arm]

    @cached_property
    def _costs(self) -> Costs:
        """What decoding costs, measured once even where a busy machine's times are not kept."""
        return known_costs(replace(self.pair, drafter=self.auto.first))

    def _ended(self) -> None:
        """Take note of what a text brought; choose, if that is enough."""
        self._busy = False
        trial = self.trial
        if not trial.is_over:
            self._keep()
            return
        trial.decide()
        say(trial.sentence(self.auto))
        if trial.is_loaded:
            say("the machine is busy, so this is tried again the next time")
        else:
            self._keep()

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
