"""What is measured beside the arms: parts of a cycle, shared prefixes, shapes, memory."""

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_distill import machine
from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench, endless, measure
from mlx_distill.benchmarking.batches import side_by_side
from mlx_distill.benchmarking.figures import spread, summary, timed
from mlx_distill.benchmarking.profile import run_profile
from mlx_distill.benchmarking.recording import record
from mlx_distill.data.prompts import Asked
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.target.context import text_limit

# Of the study of contexts: the shortest, the tokens that are written after each, and how often.
SHORTEST, GROWTH_TOKENS, GROWTH_RUNS = 128, 64, 3
SHARING_SHAPES = ((5, 4), (10, 4), (15, 5), (25, 5), (35, 5), (45, 5))


def overhead(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> dict[str, float]:
    """Return where a cycle's time goes, in milliseconds, and the overhead's share of a plain step.

    The device is waited for around every part; the overhead is all but the drafter's search and the
    target's call. Medians over the prompts.
    """
    rows = []
    for run in run_profile(bench, prompts, plan):
        target_ms, draft_ms = run.waited.part_ms("target"), run.waited.part_ms("draft")
        overhead_ms = run.waited.cycle_ms - target_ms - draft_ms
        rows.append(
            {
                "plain_step_ms": run.plain_ms,
                "cycle_ms": run.waited.cycle_ms,
                "overlapped_cycle_ms": run.free.cycle_ms,
                "verify_ms": target_ms,
                "draft_ms": draft_ms,
                "overhead_ms": overhead_ms,
                "overhead_share_of_step": overhead_ms / run.plain_ms,
            }
        )
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def growth(
    bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan | None, longest: int
) -> list[dict[str, Any]]:
    """Return every arm's speed and peak memory after texts of growing length.

    The lengths double up to ``longest``, or as far as the model reads; the texts are the prompts
    one after the other, from another one on in each turn, and none ends before all tokens are
    written. The arms write side by side, as ``side_by_side`` has it, once the prompts are read.
    There are none, and a word on stderr, where the model reads too little for any.
    """
    config = replace(bench.config, max_tokens=GROWTH_TOKENS)
    short = replace(bench, tokenizer=endless(bench.tokenizer), config=config)
    limit = text_limit(bench.model)
    longest = longest if limit is None else min(longest, limit - GROWTH_TOKENS)
    if longest < 1:
        print(f"no growing context: the model reads {limit} tokens", file=sys.stderr)
        return []
    lengths = [n for n in (SHORTEST * 2**k for k in range(24)) if n < longest]
    arms, rows = short.arms(plan), []
    for length in tqdm([*lengths, longest], desc="contexts", leave=False):
        prompt = _running(prompts, 0, length)  # and what is compiled is compiled
        peaks = {name: measure(decode, prompt, bench.config.seed) for name, decode in arms.items()}
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(GROWTH_RUNS):
            prompt = _running(prompts, turn, length)
            writing: dict[str, Iterator[int]] = {
                name: map(_one, arm(prompt, turn)) for name, arm in arms.items()
            }
            for text in writing.values():
                next(text)
            for name, speed in side_by_side(writing).items():
                speeds[name].append(speed)
        for name, found in speeds.items():
            ratios = [a / b for a, b in zip(found, speeds[PLAIN], strict=True)]
            figures = {"tokens_per_s": statistics.median(found), "ratio": spread(ratios)}
            peak = peaks[name].peak_memory_bytes
            rows.append({"context": length, "arm": name, **figures, "peak_memory_bytes": peak})
    return rows


def _one(_: object) -> int:
    return 1


def _running(prompts: Sequence[list[int]], first: int, length: int) -> list[int]:
    """Return so many tokens of prompts one after the other, from one of them on."""
    numbers = (number % len(prompts) for number in itertools.count(first))
    tokens = itertools.chain.from_iterable(prompts[number] for number in numbers)
    return list(itertools.islice(tokens, length))


def trees(
    bench: Bench, prompts: Sequence[Asked], plan: DraftPlan | None, count: int
) -> list[dict[str, Any]]:
    """Return some texts with the trees that they were written with."""
    decode = bench.arms(plan)[OURS]
    found = []
    for number, asked in enumerate(prompts[:count]):
        steps = partial(decode, asked.ids, bench.config.seed + number)
        found.append(record(steps, bench.tokenizer, asked.ids, kind=asked.kind))
    return found


def sharing(bench: Bench, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Return the share of tokens that shared prefixes save, for beams of several shapes.

    The lengths count the certain token, as the published ones do.
    """
    rows = []
    for width, length in SHARING_SHAPES:
        plan = DraftPlan(beam_width=width, draft_length=length - 1, tree="beam")
        decode = bench.arms(plan)[OURS]
        samples = [measure(decode, prompt, bench.config.seed) for prompt in prompts]
        verified = sum(sample.verified_tokens for sample in samples)
        if not verified:  # drawn texts may all end with their first token
            continue
        rows.append(
            {
                "beam_width": width,
                "beam_length": length,
                "beam_tokens": width * length,
                "saved_share": 1 - verified / sum(sample.beam_tokens for sample in samples),
                "tokens_per_call": statistics.mean(s.tokens_per_call for s in samples),
            }
        )
    return rows


def long_run(
    bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan, num_tokens: int
) -> list[dict[str, int]]:
    """Return the memory after every thousand tokens written by one process.

    Resident memory is the process's peak so far; array memory is the peak within the thousand.
    """
    decode = bench.arms(plan)[OURS]
    rows: list[dict[str, int]] = []
    written = 0
    mx.reset_peak_memory()
    with tqdm(total=num_tokens, desc="long run", unit="token", leave=False) as bar:
        while written < num_tokens:
            for _ in decode(prompts[written % len(prompts)], written):
                written += 1
                bar.update()
                if written % 1000 == 0 or written == num_tokens:
                    rows.append(
                        {
                            "tokens": written,
                            "resident_bytes": machine.peak_resident_bytes(),
                            "array_bytes": mx.get_peak_memory(),
                        }
                    )
                    mx.reset_peak_memory()
    return rows


def sweep(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> list[dict[str, Any]]:
    """Return speed-up and tokens per call for every beam width and draft length.

    A draft model has no beams, so it is left out, and so is a shape whose drawn texts all end with
    their first token.
    """
    rows = []
    config = replace(bench.config, warm_up_s=0.0)  # it is warm by now
    warm = replace(bench, draft_model=None, config=config)
    for width in bench.config.sweep_widths:
        for length in bench.config.sweep_lengths:
            shape = replace(plan, beam_width=width, draft_length=length)
            samples = warm.run(prompts, shape, f"beams {width} x {length}")
            if not any(timed(samples)):
                continue
            found = summary(samples)[-1]
            rows.append(
                {
                    "beam_width": width,
                    "draft_length": length,
                    "speedup": found["speedup"],
                    "tokens_per_call": found["tokens_per_call"],
                }
            )
    return rows
