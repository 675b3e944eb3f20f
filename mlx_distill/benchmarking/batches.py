"""Many texts at once: tokens per second of all of them together, against mlx-lm's own batches.

The arms write the same texts side by side: each makes a few steps, waits until they are computed,
and the next one goes on. So a machine whose speed changes within a second does not decide. A ratio
is that of one turn, whole texts with their prompts.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream
from tqdm import tqdm

from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench
from mlx_distill.benchmarking.figures import NOTHING_TIMED
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.errors import InputError
from mlx_distill.speculation.batch_generation import answer_steps
from mlx_distill.target.batch.merged import takes_merged

# Ours without a drafter.
UNDRAFTED = "mlx_distill, no drafts"
# Turns that count, and the steps that an arm makes before the next one goes on.
TURNS, STEPS = 5, 8

Prompts = Sequence[list[int]]
# Makes a step, and yields how many tokens the texts have that it ended.
Arm = Callable[[Prompts], Iterator[int]]


def batches(
    bench: Bench, prompts: Prompts, sizes: Sequence[int], turns: int = TURNS
) -> list[dict[str, Any]]:
    """Return the speed of every arm for so many texts at once, greedy ones.

    Args:
        bench: The pair, and how long answers are.
        prompts: Are taken in turn.
        sizes: Of the batches, in texts.
        turns: That count; one before them compiles what is compiled.

    Raises:
        InputError: If every answer ended with its first token, or one could not be written; or if
            mlx-lm's batches of this model are none to compare with.
    """
    if max(sizes) > 1 and not takes_merged(bench.model):
        raise InputError(
            "mlx-lm's batches, which ours are compared with, do not say of this model's texts "
            "together what it says of each alone; leave out --batch"
        )
    rows = []
    for size in tqdm(sizes, desc="batches", leave=False):
        speeds = dict[str, list[float]]()
        for turn in range(turns + 1):
            texts = [prompts[(turn * size + place) % len(prompts)] for place in range(size)]
            writing = {name: arm(texts) for name, arm in _arms(bench).items()}
            found = side_by_side(writing)
            if turn and all(found.values()):  # a turn's answers may all have ended at once
                for name, speed in found.items():
                    speeds.setdefault(name, []).append(speed)
        if not speeds:
            raise InputError(NOTHING_TIMED)
        rows += [
            {"texts": size, "arm": name, "tokens_per_s": _figures(found)}
            | {"ratio": _figures([a / b for a, b in zip(found, speeds[PLAIN], strict=True)])}
            for name, found in speeds.items()
        ]
    return rows


def _arms(bench: Bench) -> dict[str, Arm]:
    """Return what writes the answers to some prompts."""
    pair, most = (bench.model, bench.tokenizer), bench.config.max_tokens

    def theirs(texts: Prompts) -> Iterator[int]:
        """Write as ``mlx_lm.batch_generate`` does, a step at a time."""
        ends = [[token] for token in bench.tokenizer.eos_token_ids]
        generator = BatchGenerator(bench.model, stop_tokens=ends)
        numbers = generator.insert(list(texts), [most] * len(texts))
        found: dict[int, list[int]] = {number: [] for number in numbers}
        while responses := generator.next_generated():
            for one in responses:
                if one.finish_reason != "stop":
                    found[one.uid].append(one.token)
            yield 0
        generator.close()
        for tokens in found.values():
            bench.tokenizer.decode(tokens)
        yield sum(map(len, found.values()))

    def ours(drafter: Drafter | None) -> Arm:
        def write(texts: Prompts) -> Iterator[int]:
            options = {"drafter": drafter, "max_tokens": most, "batch": len(texts)}
            for ready in answer_steps(*pair, list(texts), **options):
                for one in ready:
                    if one.error is not None:
                        raise one.error
                # Of theirs, the token that ends a text is none of it.
                yield sum(len(one.tokens) - (one.finish_reason == "stop") for one in ready)

        return write

    return {PLAIN: theirs, UNDRAFTED: ours(None), OURS: ours(bench.drafter)}


def side_by_side(writing: dict[str, Iterator[int]]) -> dict[str, float]:
    """Return the tokens per second of arms that write the same texts, some steps each in turn.

    Args:
        writing: Every arm's texts, as they are written: the tokens that each step has ended. It is
            used up.
    """
    tokens, seconds = dict.fromkeys(writing, 0), dict.fromkeys(writing, 0.0)
    order = list(writing)
    while writing:
        for name in order:
            if name not in writing:
                continue
            start = time.perf_counter()
            for _ in range(STEPS):
                made = next(writing[name], None)
                if made is None:
                    del writing[name]
                    break
                tokens[name] += made
            mx.synchronize(generation_stream)
            seconds[name] += time.perf_counter() - start
        order.reverse()
    return {name: made / seconds[name] for name, made in tokens.items()}


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def batch_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for every row of ``batches``."""
    return [
        f"{row['texts']:3} texts  {row['arm']:22} {row['tokens_per_s']['median']:8.0f} tokens/s  "
        "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["ratio"])
        for row in rows
    ]
