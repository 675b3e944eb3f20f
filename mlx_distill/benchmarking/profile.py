"""Where a cycle's time goes, part by part, beside what the machine could do.

The parts are timed by a run in which the device is waited for before and after each of them, so
nothing overlaps and a part's time is its own; the same text written as it always is, without that
waiting, shows what the overlap saves. The two take turns, prompt by prompt, with mlx-lm alone.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from mlx_distill.benchmarking import roofline
from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench, endless, measure
from mlx_distill.benchmarking.dispatch_study import (
    as_a_gpu_has_it,
    by_phase,
    of_plain_step,
    of_tree_call,
)
from mlx_distill.benchmarking.roofline import Ceilings, Work
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.speculation.phases import PHASES, PhaseClock, Slice, watching
from mlx_distill.target.target import Target

# What lies between the parts, and what the host takes when it reads what was accepted.
HOST, READ = "host", "read"


@dataclass(frozen=True)
class Timed:
    """One text whose parts were timed, after its first token.

    Args:
        slices: The parts in order.
        start_s: When it began, on the slices' clock.
        end_s: When it ended.
        host_s: Processor time of the loop's own thread; the rest it was blocked, or not its turn.
        nodes: Tokens of a tree, on the average.
        tokens_per_call: Tokens of the text per call of the target.
    """

    slices: list[Slice]
    start_s: float
    end_s: float
    host_s: float
    nodes: float
    tokens_per_call: float

    @property
    def cycles(self) -> int:
        """The number of the target's calls."""
        return sum(one.name == "target" for one in self.slices)

    @property
    def cycle_ms(self) -> float:
        """The time of a whole cycle."""
        return 1e3 * (self.end_s - self.start_s) / max(1, self.cycles)

    @property
    def host_ms(self) -> float:
        """The processor time of the loop's own thread per cycle."""
        return 1e3 * self.host_s / max(1, self.cycles)

    def part_ms(self, name: str) -> float:
        """Return the time of a part per cycle; the host has what no other part has."""
        if name == HOST:
            return self.cycle_ms - sum(self.part_ms(part) for part in PHASES)
        return self._per_cycle(one.end_s - one.start_s for one in self.slices if one.name == name)

    def waiting_ms(self, name: str) -> float:
        """Return for how long the host waits for the device in a part, per cycle."""
        if name == HOST:
            return self.part_ms(READ)
        return self._per_cycle(one.end_s - one.built_s for one in self.slices if one.name == name)

    def _per_cycle(self, seconds: Iterator[float]) -> float:
        return 1e3 * sum(seconds) / max(1, self.cycles)


def timed(steps: Iterator[Any], waits: bool) -> Timed | None:
    """Time the parts of a text's cycles; None if it ends with its first token.

    Args:
        steps: Writes the text, a response per token.
        waits: Whether the device is waited for around every part.
    """
    clock = PhaseClock(waits)
    last = None
    with watching(clock):
        next(steps)
        clock.slices.clear()
        start, host = time.perf_counter(), time.thread_time()
        for step in steps:
            last = step
        end, host = time.perf_counter(), time.thread_time() - host
    if last is None:
        return None
    calls = max(1, last.target_calls)
    return Timed(clock.slices, start, end, host, last.verified_tokens / calls, last.tokens_per_call)


@dataclass(frozen=True)
class Profiled:
    """One prompt: a plain step's time, and the text with and without waiting.

    Args:
        plain_ms: Of a step of mlx-lm.
        waited: Timed with the device waited for.
        free: Timed as it runs.
    """

    plain_ms: float
    waited: Timed
    free: Timed


def run_profile(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> list[Profiled]:
    """Return the timed prompts, those left out whose text ends with its first token.

    Raises:
        InputError: If none is left.
    """
    arms = bench.arms(plan)
    for name in (PLAIN, OURS):
        measure(arms[name], prompts[0], 0)
    found = []
    for number, prompt in enumerate(tqdm(prompts, desc="profile", unit="prompt", leave=False)):
        seed = bench.config.seed + number
        plain_ms = 1e3 / max(measure(arms[PLAIN], prompt, seed).tokens_per_s, 1e-9)
        waited, free = (timed(arms[OURS](prompt, seed), waits) for waits in (True, False))
        if waited and free and waited.cycles and free.cycles:
            found.append(Profiled(plain_ms, waited, free))
    if not found:
        raise InputError("every answer ended with its first token, so there is nothing to time")
    return found


def profile(
    bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan, runs: Sequence[Profiled]
) -> dict[str, Any]:
    """Return the table of a profile: medians over its prompts, dispatches and ceilings.

    Args:
        bench: The pair.
        prompts: That were timed.
        plan: The shape of the drafts.
        runs: What was timed of them.
    """
    dtype = bench.dtype
    ceilings = Ceilings.measured(dtype)
    nodes = max(1, round(_median([run.waited.nodes for run in runs])))
    context = round(_median([len(p) + bench.config.max_tokens / 2 for p in prompts]))
    target = Target.of(bench.model)
    work: dict[str, Work | None] = {
        "draft": roofline.of_draft(bench.drafter, plan),
        "target": roofline.of_call(bench.model, nodes, context),
        "walk": roofline.of_walk(target.vocab_size, nodes, dtype),
    }
    drafter = as_a_gpu_has_it(bench.drafter)
    counted = replace(bench, drafter=drafter, tokenizer=endless(bench.tokenizer))
    sent = by_phase(counted.arms(plan)[OURS](prompts[0], bench.config.seed))
    sent["target"] = of_tree_call(bench.model, nodes)
    waited = [run.waited for run in runs]
    cycle_ms = _median([one.cycle_ms for one in waited])
    rows = []
    for name in (*PHASES, HOST):
        part_ms = _median([one.part_ms(name) for one in waited])
        rows.append(
            {
                "part": name,
                "ms": part_ms,
                "share": part_ms / cycle_ms,
                "waiting_ms": _median([one.waiting_ms(name) for one in waited]),
                "dispatches": sent[name],
                **_ceiling(work.get(name), ceilings, part_ms),
            }
        )
    plain_ms = _median([run.plain_ms for run in runs])
    step = roofline.of_call(bench.model, 1, context)
    return {
        "parts": rows,
        "waited_cycle_ms": cycle_ms,
        "cycle_ms": _median([run.free.cycle_ms for run in runs]),
        "host_ms": _median([run.free.host_ms for run in runs]),
        "plain_step": {
            "ms": plain_ms,
            "dispatches": of_plain_step(bench.model),
            **_ceiling(step, ceilings, plain_ms),
        },
        "nodes": nodes,
        "context": context,
        "tokens_per_call": _median([run.free.tokens_per_call for run in runs]),
        "prompts": len(runs),
        "ceilings": ceilings.to_dict(),
    }


def _ceiling(work: Work | None, ceilings: Ceilings, part_ms: float) -> dict[str, Any]:
    """Return the roofline beside a figure; a part whose work is not estimated has none."""
    if work is None:
        return {"bytes": None, "flops": None, "ceiling_ms": None, "reached": None}
    least = work.ceiling_ms(ceilings)
    reached = least / part_ms if part_ms else None
    return {"bytes": work.bytes, "flops": work.flops, "ceiling_ms": least, "reached": reached}


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
