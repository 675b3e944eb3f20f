"""What is measured beside the arms: parts of a cycle, shared prefixes, shapes, memory."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_distill import machine
from mlx_distill.benchmarking.arms import OURS, Bench, measure
from mlx_distill.benchmarking.figures import summary
from mlx_distill.benchmarking.profile import run_profile
from mlx_distill.drafters.protocol import DraftPlan

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
    """Return speed-up and tokens per call for every beam width and draft length."""
    rows = []
    for width in bench.config.sweep_widths:
        for length in bench.config.sweep_lengths:
            shape = replace(plan, beam_width=width, draft_length=length)
            found = summary(bench.run(prompts, shape, f"beams {width} x {length}"))[-1]
            rows.append(
                {
                    "beam_width": width,
                    "draft_length": length,
                    "speedup": found["speedup"],
                    "tokens_per_call": found["tokens_per_call"],
                }
            )
    return rows
