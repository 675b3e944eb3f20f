"""Many texts at once: tokens per second of all of them together, against mlx-lm's own batches.

The arms take turns, each time with the next prompts; a ratio is that of one turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx_lm
from tqdm import tqdm

from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.speculation.batch_generation import batch_generate

# Ours without a drafter.
UNDRAFTED = "mlx_distill, no drafts"
TURNS = 5

Prompts = Sequence[list[int]]
Arm = Callable[[Prompts], int]


def batches(
    bench: Bench, prompts: Prompts, sizes: Sequence[int], turns: int = TURNS
) -> list[dict[str, Any]]:
    """Return the speed of every arm for so many texts at once, greedy ones.

    Args:
        bench: The pair, and how long answers are.
        prompts: Are taken in turn.
        sizes: Of the batches, in texts.
        turns: That count; one before them compiles what is compiled.
    """
    rows = []
    for size in tqdm(sizes, desc="batches", leave=False):
        arms, speeds = _arms(bench), dict[str, list[float]]()
        for turn in range(turns + 1):
            texts = [prompts[(turn * size + place) % len(prompts)] for place in range(size)]
            for name, arm in arms.items():
                speed = _tokens_per_s(arm, texts)
                if turn:
                    speeds.setdefault(name, []).append(speed)
        rows += [
            {"texts": size, "arm": name, "tokens_per_s": _figures(found)}
            | {"ratio": _figures([a / b for a, b in zip(found, speeds[PLAIN], strict=True)])}
            for name, found in speeds.items()
        ]
    return rows


def _arms(bench: Bench) -> dict[str, Arm]:
    """Return what writes the answers to some prompts and returns how many tokens they have."""
    pair, most = (bench.model, bench.tokenizer), bench.config.max_tokens

    def theirs(texts: Prompts) -> int:
        options = {"max_tokens": most, "return_token_ids": True}
        return sum(map(len, mlx_lm.batch_generate(*pair, list(texts), **options).token_ids or []))

    def ours(drafter: Drafter | None) -> Arm:
        def write(texts: Prompts) -> int:
            options = {"drafter": drafter, "max_tokens": most, "batch": len(texts)}
            return sum(len(answer.tokens) for answer in batch_generate(*pair, texts, **options))

        return write

    return {PLAIN: theirs, UNDRAFTED: ours(None), OURS: ours(bench.drafter)}


def _tokens_per_s(arm: Arm, texts: Prompts) -> float:
    start = time.perf_counter()
    tokens = arm(texts)
    return tokens / (time.perf_counter() - start)


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def batch_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for every row of ``batches``."""
    return [
        f"{row['texts']:3} texts  {row['arm']:22} {row['tokens_per_s']['median']:8.0f} tokens/s  "
        "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["ratio"])
        for row in rows
    ]
