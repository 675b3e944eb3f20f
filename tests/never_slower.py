"""How fast the default settings are where drafting cannot pay; status 1 below 0.97 of mlx-lm.

    python tests/never_slower.py                                the bundled pair
    python tests/never_slower.py --model FOLDER --context 4096  a model with long contexts

    useless   a drafter with random weights
    hostile   a target whose every further row costs a plain step
    own       the drafter as it is

Not collected by pytest: it measures time, so nothing else may run meanwhile. Arms take turns
prompt by prompt; what counts is the median over the prompts of the ratio on the same prompt.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill.benchmark import PROMPTS
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.figures import summary
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.files import read_jsonl
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target

import mlx.core as mx  # isort: skip
from parity import drafter_for  # isort: skip

LEAST = 0.97


def plain_step_s(target: Target) -> float:
    """Return what a call of one row takes."""
    caches = prompt_caches(target.model)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        mx.eval(target.model(mx.array([[1]]), cache=caches))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def hostile(target: Target) -> Iterator[None]:
    """Let every row of a call beyond the first take as long as a plain step."""
    step_s, verify = plain_step_s(target), target.verify

    def slow(tree: Any, caches: Any, taps: Sequence[int] = ()) -> Any:
        call = verify(tree, caches, taps)
        rows = tree.tokens.size
        if rows > 1:
            mx.eval(call.logits)
            time.sleep((rows - 1) * step_s)
        return call

    target.verify = slow
    try:
        yield
    finally:
        del target.verify


def texts(arguments: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Return prompts; with ``--context``, so many tokens of them joined."""
    rows = [row for _, row in read_jsonl(arguments.data)]
    whole = [
        row["turns"][0] if "turns" in row else row.get("prompt", row.get("text")) for row in rows
    ]
    encoded = [encode_prompt(tokenizer, text) for text in whole]
    size, count = arguments.context, arguments.num_prompts
    if not size:
        return encoded[:count]
    joined = list(
        itertools.islice(itertools.chain.from_iterable(itertools.cycle(encoded)), size + count)
    )
    return [joined[place : place + size] for place in range(count)]


def main() -> int:
    """Print the ratio of every case; return 1 if one is too low."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=bundled("stories-14m"))
    parser.add_argument("--drafter", help="folder, hub repository or ngram (default: the bundled)")
    parser.add_argument("--data", default=PROMPTS, help="JSONL rows with prompt, turns or text")
    parser.add_argument("--context", type=int, default=0, help="of the prompts, in tokens")
    parser.add_argument("--num-prompts", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temp", type=float, default=0.0)
    arguments = parser.parse_args()
    model, tokenizer = mlx_distill.load(arguments.model)
    own = arguments.drafter or bundled("stories-14m-redrafter")
    cases = {"useless": None, "hostile": own, "own": own}
    prompts, law = texts(arguments, tokenizer), Sampling(arguments.temp)
    config = BenchmarkConfig(arguments.num_prompts, max_tokens=arguments.max_tokens)
    worst = 1.0
    for name, drafter_name in cases.items():
        drafter = drafter_for(drafter_name, model, tokenizer)
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # every case is calibrated by itself
        with hostile(Target.of(model)) if name == "hostile" else nullcontext():
            bench = Bench(model, tokenizer, drafter, None, law, config)
            row = summary(bench.run(prompts, None, name))[-1]
        speedup = row["speedup"]
        worst = min(worst, speedup["median"])
        print(
            f"{name}: {speedup['median']:.3f} ({speedup['quartile_1']:.3f} to "
            f"{speedup['quartile_3']:.3f}), {row['nodes_per_call']:.1f} nodes per call",
            flush=True,
        )
    return int(worst < LEAST)


if __name__ == "__main__":
    sys.exit(main())
