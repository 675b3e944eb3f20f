"""Measure what decoding costs: calls of the target by rows and context, drafts, and the rest.

Calls and drafts are timed in turn, so that each finds the caches of the processor as the other left
them, as it does in decoding.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_distill import openblas
from mlx_distill.calibration.config import COARSE, QUICK, SLOW_STEP_S, CalibrationConfig
from mlx_distill.calibration.kernels import probe_kernels
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.tasks import PLAN, Decoding, Reading
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
# How tokens are drawn in them.
LAWS = GREEDY, Sampling(temperature=1.0)


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Args:
        costs: For the planner.
        times: Of every task, by what it was: ("call", context, rows), ("draft", width, length),
            ("plain", temperature) for a step of mlx-lm's loop, ("cycle", temperature) for one of
            the loop that drafts.
        kernels: What was found of the kernels, with which all of this was measured; empty where
            none can be used.
    """

    costs: Costs
    times: dict[tuple[Any, ...], Times]
    kernels: Sequence[Verdict] = ()


def calibrate(
    pair: Pair,
    config: CalibrationConfig,
    clock: Clock = time.perf_counter,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Calibration:
    """Measure what decoding costs.

    Args:
        pair: A model and its drafter.
        config: How much is measured.
        clock: Returns the seconds since some time.
        progress: Is handed the rounds, to show them.

    Raises:
        InputError: If the model cannot be drafted for.
    """
    pair.target.require_drafting()
    settle(pair.drafter)
    contexts = usable_contexts(pair, config)
    kernels = probe_kernels(pair, contexts[0], clock)
    threads = _choose_threads(pair, config, contexts[0], clock)
    widths = (1,) if pair.target.support == "chain" else config.widths
    readings = {context: Reading.of(pair, context) for context in contexts}
    tasks: dict[tuple[Any, ...], Task] = {
        ("call", context, rows): reading.call(rows)
        for context, reading in readings.items()
        for rows in config.rows
    }
    tasks |= {
        ("draft", width, length): readings[contexts[0]].draft(DraftPlan(width, length))
        for width in widths
        for length in config.lengths
    }
    whole = {law: Decoding(pair, PLAN, law, contexts[0], config.cycles) for law in LAWS}
    for law, decoding in whole.items():
        tasks["plain", law.temperature] = Decoding(pair, None, law, contexts[0], config.cycles)
        tasks["cycle", law.temperature] = decoding
    times = time_in_turn(_mixed(tasks), config.rounds, config.limit_s, clock, progress)
    costs = Costs(
        contexts,
        config.rows,
        tuple(tuple(times["call", c, r].median_s for r in config.rows) for c in contexts),
        widths,
        config.lengths,
        tuple(tuple(times["draft", w, n].median_s for n in config.lengths) for w in widths),
        threads=threads,
        spread=typical_spread(times.values()),
    )
    nodes = [decoding.nodes for decoding in whole.values()]
    costs = _with_overheads(costs, times, nodes, contexts[0])
    greedy, sampled = _promised(pair, whole, contexts[0], clock)
    costs = replace(costs, cycle_tokens=greedy, sampled_cycle_tokens=sampled)
    return Calibration(costs, times, kernels)


def _promised(
    pair: Pair, whole: Mapping[Sampling, Decoding], context: int, clock: Clock
) -> Sequence[float]:
    """Return what cycles bring at each of the laws, as far as that says something of other texts.

    Of n-grams it says nothing: what was decoded repeats itself. So of a mixture, it is what its
    other drafter brings alone.
    """
    drafter = pair.drafter
    if isinstance(drafter, NGramDrafter):
        return [0.0 for _ in whole]
    if isinstance(drafter, MixedDrafter):
        other = replace(pair, drafter=drafter.drafter)
        whole = {law: Decoding(other, PLAN, law, context, one.cycles) for law, one in whole.items()}
        for decoding in whole.values():
            decoding(clock)
    return [decoding.tokens for decoding in whole.values()]


def quick_config(pair: Pair, clock: Clock = time.perf_counter) -> CalibrationConfig:
    """Return what is measured at the first use of a pair: less where its steps are slow."""
    step = Reading.of(pair, usable_contexts(pair, COARSE)[0]).call(1)
    step(clock)
    return QUICK if min(step(clock) for _ in range(3)) <= SLOW_STEP_S else COARSE


def usable_contexts(pair: Pair, config: CalibrationConfig) -> tuple[int, ...]:
    """Return the contexts that leave room for the longest call; at least one."""
    limits = (pair.target.context, position_limit(pair.model), pair.cache.max_kv_size)
    room = min((limit for limit in limits if limit is not None), default=10**9)
    room -= max(*config.rows, 8 * config.cycles)
    return tuple(n for n in config.contexts if n <= room) or (max(1, room // 2),)


def _choose_threads(
    pair: Pair, config: CalibrationConfig, context: int, clock: Clock
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
    times = time_in_turn(tasks, config.rounds, config.limit_s / 4, clock)
    most, fewer = (times[threads].median_s for threads in choices)
    best = choices[fewer < CLEARLY_FASTER * most]
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
    costs: Costs, times: dict[tuple[Any, ...], Times], nodes: Sequence[int], context: int
) -> Costs:
    """Return the costs with what whole steps and cycles take beyond their parts.

    Args:
        costs: Of the parts.
        times: Of everything.
        nodes: That a cycle verified, at each of the laws. Where the drafter had nothing to say, the
            cycle was a plain step and tells nothing.
        context: At which they were timed.
    """
    plain, cycle = [], []
    for law, size in zip(LAWS, nodes, strict=True):
        step_s, cycle_s = (times[name, law.temperature].median_s for name in ("plain", "cycle"))
        plain.append(step_s - costs.plain(context))
        cycle.append(cycle_s - costs.cycle(PLAN, size, context) if size > 1 else 0.0)
    return replace(
        costs,
        overhead_s=cycle[0],
        plain_overhead_s=plain[0],
        sampled_overhead_s=cycle[1],
        sampled_plain_overhead_s=plain[1],
    )


def summary(calibration: Calibration) -> Sequence[dict[str, Any]]:
    """Return every time as a row for a report."""
    return [
        {"what": name[0], "of": list(name[1:]), "median_s": t.median_s, "spread": t.spread}
        for name, t in calibration.times.items()
    ]
