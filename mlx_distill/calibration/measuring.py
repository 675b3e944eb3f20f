"""Measure what decoding costs: calls of the target by rows and context, drafts, and the rest.

Calls and drafts are timed in turn, so that each finds the caches of the processor as the other left
them, as it does in decoding.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from mlx_distill.blas import openblas
from mlx_distill.calibration.config import COARSE, QUICK, SLOW_STEP_S, CalibrationConfig
from mlx_distill.calibration.crowding import crowding
from mlx_distill.calibration.kernels import probe_kernels
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.tasks import LINE, PLAN, Decoding, Reading
from mlx_distill.calibration.timing import Clock, Task, Times, time_in_turn, typical_spread
from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.drafters.bound import settle
from mlx_distill.drafters.mixture import MixedDrafter
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.kernels.probe import Verdict
from mlx_distill.speculation.costs import Costs
from mlx_distill.target.context import position_limit

# All threads are used, as plain decoding does, unless cycles take less than this share with fewer.
CLEARLY_FASTER = 0.97
# At other programs, before every round.
LOOKS = 3
# How tokens are drawn in them.
LAWS = GREEDY, Sampling(temperature=1.0)
Name = tuple[Any, ...]  # of a task, see ``Calibration``


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Args:
        costs: For the planner.
        times: Of every task, by what it was: ("call", context, rows), ("draft", width, length),
            ("plain", temperature) for a step of mlx-lm's loop, ("cycle", temperature) for one of
            the loop that drafts, and ("line", temperature) for one that drafts a line.
        kernels: What was found of the kernels, with which all of this was measured; empty where
            none can be used.
    """

    costs: Costs
    times: dict[tuple[Any, ...], Times]
    kernels: Sequence[Verdict] = ()

    @property
    def knows_drafting(self) -> bool:
        """Whether there was time for a draft and a call that verifies one.

        Where nothing was ever compiled, there may be none: then no text is drafted for.
        """
        calls = {name[2] for name in self.times if name[0] == "call"}
        return len(calls) > 1 and any(name[0] == "draft" for name in self.times)


def calibrate(
    pair: Pair,
    config: CalibrationConfig,
    clock: Clock = time.perf_counter,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    since: float | None = None,
    crowded: Callable[[int], float] = crowding,
) -> Calibration:
    """Measure what decoding costs.

    Times that lie close together may all be those of a machine that others use: how crowded it was
    in between counts as their spread where it is more.

    Args:
        pair: A model and its drafter.
        config: How much is measured.
        clock: Returns the seconds since some time.
        progress: Is handed the rounds, to show them.
        since: What the clock said when the deadline began to run; None if it begins now.
        crowded: Returns how crowded the machine is, by so many looks.

    Raises:
        InputError: If the model cannot be drafted for.
    """
    start = clock() if since is None else since
    until = start + config.deadline_s
    pair.target.require_drafting()
    settle(pair.drafter)
    config = replace(config, rows=usable_rows(pair, config.rows))
    context, *_ = contexts = usable_contexts(pair, config)
    kernels = probe_kernels(pair, context, clock)
    threads = _choose_threads(pair, config, context, clock, start + config.deadline_s / 5)
    whole: dict[Name, Decoding] = {
        (kind, law.temperature): Decoding(pair, plan, law, context, config.cycles)
        for law in LAWS
        for kind, plan in _whole_shapes(pair).items()
    }
    tasks = {**_tasks(pair, config, contexts), **whole}
    ordered = {name: tasks[name] for name in sorted(_mixed(tasks), key=_importance(context))}
    others: list[float] = []

    def watched(rounds: Iterable[int]) -> Iterator[int]:
        for number in progress(rounds):
            others.append(crowded(LOOKS))
            yield number

    times = time_in_turn(ordered, config.rounds, config.limit_s, clock, watched, until)
    spread = max(typical_spread(times.values()), statistics.median(others))
    costs = replace(_costs(times), threads=threads, spread=spread)
    costs = _with_overheads(pair, costs, times, whole, context)
    default = {law: whole["cycle", law.temperature] for law in LAWS}
    greedy, sampled = _promised(pair, default, context, clock, until)
    costs = replace(costs, cycle_tokens=greedy, sampled_cycle_tokens=sampled)
    return Calibration(costs, times, kernels)


def _whole_shapes(pair: Pair) -> dict[str, DraftPlan]:
    """Return the shapes of the cycles that are timed whole, by what they are called."""
    return {"cycle": PLAN} if pair.target.prefers_lines else {"cycle": PLAN, "line": LINE}


def _tasks(pair: Pair, config: CalibrationConfig, contexts: Sequence[int]) -> dict[Name, Task]:
    """Return what is timed, by name, cycles of drafting left out; texts are read when needed."""
    reading = cache(partial(Reading.of, pair))
    widths = (1,) if pair.target.prefers_lines else config.widths
    tasks: dict[Name, Task] = {
        ("call", context, rows): _when_needed(lambda c=context, n=rows: reading(c).call(n))
        for context in contexts
        for rows in config.rows
    }
    tasks |= {
        ("draft", w, n): _when_needed(lambda w=w, n=n: reading(contexts[0]).draft(DraftPlan(w, n)))
        for w in widths
        for n in config.lengths
    }
    return tasks | {
        ("plain", law.temperature): Decoding(pair, None, law, contexts[0], config.cycles)
        for law in LAWS
    }


def _when_needed(make: Callable[[], Task]) -> Task:
    """Return a task that is made when it is timed for the first time."""
    made = cache(make)
    return lambda clock: made()(clock)


def _importance(context: int) -> Callable[[Name], int]:
    """Return how far behind a task comes, where there may be no time for all of them.

    A plain step and a cycle of the default shape tell whether drafting pays at all; then the parts
    of that cycle, for they tell of others; other contexts come last.
    """

    def place(name: Name) -> int:
        kind, *of = name
        if kind == "call" and of[0] != context:
            return 4
        if name == ("call", context, 1):
            return 0
        if kind in ("plain", "cycle", "line"):
            return (2 if kind == "line" else 1) if of[0] == GREEDY.temperature else 3
        default = (context, PLAN.nodes), (PLAN.beam_width, PLAN.draft_length)
        return 2 if tuple(of) == default[kind == "draft"] else 3

    return place


def _costs(times: Mapping[Name, Times]) -> Costs:
    """Return the costs of calls and drafts, as far as whole tables of them were timed.

    Without any draft, the target's plain step is all that is known.
    """
    calls = {name[1:]: one.median_s for name, one in times.items() if name[0] == "call"}
    drafts = {name[1:]: one.median_s for name, one in times.items() if name[0] == "draft"}
    contexts, rows = _table(calls)
    widths, lengths = _table(drafts)
    if not drafts:
        rows, widths, lengths, drafts = (1,), (1,), (1,), {(1, 1): 0.0}
    return Costs(
        contexts,
        rows,
        tuple(tuple(calls[context, n] for n in rows) for context in contexts),
        widths,
        lengths,
        tuple(tuple(drafts[width, n] for n in lengths) for width in widths),
    )


def _table(values: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return rows and columns of a table that there are all values of, and most in a row."""
    columns: dict[int, set[int]] = {}
    for row, column in values:
        columns.setdefault(row, set()).add(column)
    most = max(columns.values(), key=len, default=set())  # of several, what was timed first
    return tuple(sorted(row for row in columns if columns[row] >= most)), tuple(sorted(most))


def _promised(
    pair: Pair, whole: Mapping[Sampling, Decoding], context: int, clock: Clock, until: float
) -> Sequence[float]:
    """Return what cycles bring at each of the laws, as far as that says something of other texts.

    Of n-grams it says nothing: what was decoded repeats itself. So of a mixture, it is what its
    other drafter brings alone. It is 0 where there was no time to find out.
    """
    drafter = pair.drafter
    if isinstance(drafter, NGramDrafter):
        return [0.0 for _ in whole]
    if isinstance(drafter, MixedDrafter):
        other = replace(pair, drafter=drafter.drafter)
        whole = {law: Decoding(other, PLAN, law, context, one.cycles) for law, one in whole.items()}
        for decoding in whole.values():
            if clock() <= until:
                decoding(clock)
    return [decoding.tokens for decoding in whole.values()]


def quick_config(pair: Pair, clock: Clock = time.perf_counter) -> CalibrationConfig:
    """Return what is measured at the first use of a pair: less where its steps are slow."""
    step = Reading.of(pair, usable_contexts(pair, COARSE)[0]).call(1)
    step(clock)
    return QUICK if min(step(clock) for _ in range(3)) <= SLOW_STEP_S else COARSE


def usable_rows(pair: Pair, rows: Sequence[int]) -> tuple[int, ...]:
    """Return the rows that a call on a line can have behind one token; a plain step among them.

    A model that looks positions up would read foreign memory for those behind its table.
    """
    limit = position_limit(pair.model)
    return tuple(n for n in rows if n == 1 or limit is None or n < limit)


def usable_contexts(pair: Pair, config: CalibrationConfig) -> tuple[int, ...]:
    """Return the contexts that leave room for the longest call; at least one."""
    limits = (pair.target.context, position_limit(pair.model), pair.cache.max_kv_size)
    room = min((limit for limit in limits if limit is not None), default=10**9)
    room -= max(*config.rows, 8 * config.cycles)
    return tuple(n for n in config.contexts if n <= room) or (max(1, room // 2),)


def _choose_threads(
    pair: Pair, config: CalibrationConfig, context: int, clock: Clock, until: float
) -> int | None:
    """Let drafting use the threads of matrix products that its cycles are fastest with.

    What is timed are whole cycles: a thread fewer leaves a core to what builds the graphs.
    """

    def with_threads(threads: int) -> Task:
        def timed(clock: Clock) -> float:
            openblas.prefer(threads)
            return decoding(clock)

        return timed

    choices = openblas.choices()
    if not choices:
        return None
    decoding = Decoding(pair, PLAN, GREEDY, context, config.cycles)
    tasks = {threads: with_threads(threads) for threads in choices}
    times = time_in_turn(tasks, config.rounds, config.limit_s / 4, clock, until=until)
    most, *fewer = (one.median_s for one in times.values())
    best = choices[bool(fewer) and fewer[0] < CLEARLY_FASTER * most]
    openblas.prefer(best)
    return best


def _mixed(tasks: dict[tuple[Any, ...], Task]) -> dict[tuple[Any, ...], Task]:
    """Return the tasks with the drafts between the calls."""
    kinds: dict[bool, list[tuple[Any, ...]]] = {True: [], False: []}
    for name in tasks:
        kinds[name[0] == "call"].append(name)
    step = max(1, len(kinds[True]) // max(1, len(kinds[False])))
    names = []
    for place, name in enumerate(kinds[True]):
        names.append(name)
        if place % step == 0 and kinds[False]:
            names.append(kinds[False].pop())
    return {name: tasks[name] for name in [*names, *kinds[False]]}


def _with_overheads(
    pair: Pair,
    costs: Costs,
    times: Mapping[Name, Times],
    whole: Mapping[Name, Decoding],
    context: int,
) -> Costs:
    """Return the costs with what whole steps and cycles take beyond their parts.

    Args:
        pair: Whose costs they are.
        costs: Of the parts.
        times: Of everything. What is missing is taken to be as at the other law, or nothing.
        whole: What decoded in cycles, and knows how many nodes they verified. Where the drafter had
            nothing to say, a cycle was a plain step and tells nothing.
        context: At which they were timed.
    """
    found: dict[str, list[float]] = {"plain": [], "cycle": [], "line": []}
    for law in LAWS:
        step = times.get(("plain", law.temperature))
        if step:
            found["plain"].append(step.median_s - costs.plain(context))
        for kind, plan in _whole_shapes(pair).items():
            name = kind, law.temperature
            if name in times:
                size = whole[name].nodes
                more = times[name].median_s - costs.cycle(plan, size, context)
                found[kind].append(more if size > 1 else 0.0)
    (plain, cycle), line = (found[kind] or [0.0] for kind in ("plain", "cycle")), found["line"]
    return replace(
        costs,
        overhead_s=cycle[0],
        plain_overhead_s=plain[0],
        line_overhead_s=line[0] if line else None,
        sampled_overhead_s=cycle[-1],
        sampled_plain_overhead_s=plain[-1],
        sampled_line_overhead_s=line[-1] if line else None,
    )


def summary(calibration: Calibration) -> Sequence[dict[str, Any]]:
    """Return every time as a row for a report."""
    return [
        {"what": name[0], "of": list(name[1:]), "median_s": t.median_s, "spread": t.spread}
        for name, t in calibration.times.items()
    ]
