"""Texts of the bundled pair that were recorded, and machines that they are decoded on, simulated.

A simulated text knows for each of its places what any shape of draft would have come to, so the
best fixed shape is known in hindsight. Time is a sum of costs; nothing is timed.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_distill.benchmarking.traces import TracedText
from mlx_distill.drafters.protocol import DraftPlan, Outcome
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner

ROWS = (*range(1, 18), 24, 32, 33)
WIDTHS, LENGTHS = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)
CURVES: dict[str, Callable[[int], float]] = {
    "flat": lambda rows: 1 + 0.003 * rows,
    "linear": lambda rows: 1 + 0.08 * (rows - 1),
    "steep": lambda rows: 1 + 0.3 * (rows - 1),
    "a cliff behind 8": lambda rows: 1 + 0.01 * rows + 1.0 * (rows > 8) + 1.5 * (rows > 16),
    "steps of 4": lambda rows: 1 + 0.02 * rows + 0.8 * ((rows - 1) // 4),
    "two cores": lambda rows: float(
        np.interp(rows, [1, 2, 4, 8, 12, 16, 33], [1, 1.08, 1.31, 1.48, 1.91, 1.96, 3.6])
    ),
}


def costs(curve: Callable[[int], float], draft: float = 0.03, overhead: float = 0.05) -> Costs:
    """Return a machine's costs; a draft costs something for every token, more with wide beams."""
    drafts = tuple(tuple(0.02 + draft * n * (1 + 0.1 * w) for n in LENGTHS) for w in WIDTHS)
    calls = tuple(float(curve(rows)) for rows in ROWS)
    return Costs((128,), ROWS, (calls,), WIDTHS, LENGTHS, drafts, overhead)


class Text(TracedText):
    """A traced text on a simulated machine."""

    def fixed(self, machine: Costs, plan: DraftPlan, num_tokens: int) -> float:
        """Return the tokens per plain step's time with one shape throughout."""
        place, cycles = self.written(plan, num_tokens)
        return place / (cycles * machine.cycle(plan, plan.nodes, 128) / machine.plain(128))

    @functools.cache  # noqa: B019  (the same on every machine, and there are few texts)
    def written(self, plan: DraftPlan, num_tokens: int) -> tuple[int, int]:
        """Return the tokens, at least so many, and the cycles that write them with one shape."""
        place = cycles = 0
        while place < num_tokens:
            place += self.num_tokens(place, plan)
            cycles += 1
        return place, cycles

    def best(self, machine: Costs, num_tokens: int) -> float:
        """Return the same of the best fixed shape, which may be none at all."""
        shapes = itertools.product((1, 2, 4, 8), (1, 2, 3, 4, 6), (2, 3, 4, 5, 6, 7, 8, 12, 16, 32))
        return max(1.0, *(self.fixed(machine, DraftPlan(*one), num_tokens) for one in shapes))


class Run:
    """A planner at work on a text; it hears of a cycle when the next but one is planned.

    ``truth`` is what a machine really costs that should cost what ``machine`` says; the planner is
    then told the seconds.
    """

    def __init__(
        self,
        text: Text,
        machine: Costs,
        planner: AdaptivePlanner,
        number: int = 0,
        truth: Callable[[float, int], float] | None = None,
    ):
        self.text, self.machine, self.planner, self.number = text, machine, planner, number
        self.truth = truth
        self.place = 0
        self.time = 0.0
        self.plans: list[DraftPlan | None] = []
        self.outcome: Outcome | None = None
        self.next = planner.shape(number, None)

    def until(self, num_tokens: int) -> float:
        """Go on to a number of tokens; return the tokens per plain step's time so far."""
        while self.place < num_tokens:
            plan, self.next = self.next, self.planner.shape(self.number, self.outcome)
            self.plans.append(plan)
            parents, path = ((0,), (0,)) if plan is None else self.text.tree(self.place, plan)
            plain = self.machine.plain(128)
            cycle = plain if plan is None else self.machine.cycle(plan, plan.nodes, 128)
            seconds = None
            if self.truth is not None:
                cycle, plain = (self.truth(x / plain, len(self.plans)) for x in (cycle, plain))
                seconds = cycle * self.machine.plain(128)
            self.time += cycle / plain
            self.outcome = Outcome(100, parents, len(path) - 1, path, seconds=seconds)
            self.place += len(path)
        return self.place / self.time


def recorded() -> list[dict[str, list]]:
    file = Path(__file__).parent / "draft_traces.json"
    return json.loads(file.read_text(encoding="utf-8"))


def recorded_texts() -> dict[str, Text]:
    """Return the texts by how their tokens were drawn."""
    traces = recorded()
    greedy, drawn = traces[:3], traces[3:]
    mixed = [trace for pair in zip(greedy, drawn, strict=True) for trace in pair]
    kinds = {"greedy": greedy, "drawn": drawn, "mixed": mixed}
    return {name: Text([one for t in some for one in t["places"]]) for name, some in kinds.items()}


USELESS = Text([((0, 0, 0, 1, 1, 3, 5, 2, *range(25)), ())])


def drifting(more: float, spread: float = 0.1) -> Callable[[float, int], float]:
    """Return a machine whose speed goes up and down by a third, and whose drafts are dear."""
    noise = np.random.default_rng(0).lognormal(0, spread, 10_000)

    def seconds(foretold: float, cycle: int) -> float:
        drift = 1 + 0.3 * np.sin(cycle / 20)
        chance = noise[cycle] if foretold != 1 else 1.0
        return float(drift * chance * (1 + more * (foretold - 1)))

    return seconds


class Resting(Run):
    """Makes the plain steps that are known to come in a row; the planner is told afterwards."""

    def until(self, num_tokens: int) -> float:
        while self.place < num_tokens:
            steps = 0 if self.next else self.planner.rest(self.number, self.outcome)
            if steps:
                self.plans += [None] * steps
                self.time += steps
                self.place += steps
                self.planner.rested(self.number, steps, None)
            super().until(self.place + 1)
        return self.place / self.time


class Early(Run):
    """Launches every cycle while the plain step before it is read, as a slow host does.

    So that step seems to take the time of the cycle behind it.
    """

    def until(self, num_tokens: int) -> float:
        while self.place < num_tokens:
            plan, self.next = self.next, self.planner.shape(self.number, self.outcome)
            self.plans.append(plan)
            parents, path = ((0,), (0,)) if plan is None else self.text.tree(self.place, plan)
            self.time += self.took(plan)
            first = plan is not None and self.plans[-2:-1] == [None]
            seconds = 0.0 if first else self.took(plan)
            if plan is None:
                behind = self.plans[-2] if len(self.plans) > 1 else None
                seconds = self.took(self.next) + (behind is not None) * self.took(None)
            self.outcome = Outcome(100, parents, len(path) - 1, path, seconds=seconds)
            self.place += len(path)
        return self.place / self.time

    def took(self, plan: DraftPlan | None) -> float:
        plain = self.machine.plain(128)
        return 1.0 if plan is None else self.machine.cycle(plan, plan.nodes, 128) / plain
