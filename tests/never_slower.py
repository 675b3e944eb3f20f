"""How fast the default settings are where drafting cannot pay; status 1 below 0.97 of mlx-lm.

    python tests/never_slower.py                                           the bundled pair
    python tests/never_slower.py --model FOLDER --data question.jsonl      another, class by class

    useless   a drafter with random weights
    hostile   a target whose every further row costs a plain step
    own       the drafter that is bundled with the package, as it is; where rows of --data name
              classes, each of them
    long      own and useless after --context tokens, or as many as the model has room for

Not collected by pytest: it measures time, so nothing else may run meanwhile. It takes about four
minutes with the bundled pair and six with a model of 135M. Arms take turns prompt by prompt, all of
them --repeats times; what counts is the median of the ratios on the same prompt.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill import machine
from mlx_distill.benchmark import PROMPTS
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.figures import summary
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import Asked, in_turn, read_asked
from mlx_distill.drafters.registry import bundled_drafter
from mlx_distill.files import write_whole
from mlx_distill.names import shown
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target

import mlx.core as mx  # isort: skip
from parity import drafter_for  # isort: skip

LEAST = 0.97
Row = dict[str, Any]


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


@dataclass(frozen=True)
class Case:
    """What is measured at once.

    Args:
        name: Of it.
        prompts: They are decoded by both arms.
        drafts: Whether the drafter is the real one.
        is_hostile: Whether further rows cost a plain step each.
    """

    name: str
    prompts: list[Asked]
    drafts: bool = True
    is_hostile: bool = False


def cases(short: list[Asked], arguments: argparse.Namespace, room: int) -> Iterator[Case]:
    """Yield what is measured; ``room`` is the longest prompt."""
    some = short[: arguments.num_prompts]
    yield Case("useless", some, drafts=False)
    yield Case("hostile", some, is_hostile=True)
    kinds = sorted({one.kind for one in short if one.kind is not None})
    if not kinds:
        yield Case("own", some)
    for kind in kinds:
        yield Case(f"own, {kind}", [x for x in short if x.kind == kind][: arguments.per_class])
    size = min(arguments.context, room)
    text = list(itertools.islice(itertools.cycle(x for one in short for x in one.ids), 2 * size))
    long = [Asked(text[place : place + size]) for place in range(arguments.num_long)]
    yield Case(f"useless, {size} tokens of context", long, drafts=False)
    yield Case(f"own, {size} tokens of context", long)


def measured(pair: tuple[Any, Any, Any], case: Case, arguments: argparse.Namespace) -> Row:
    """Return the figures of a case: its ratio with quartiles, tokens and nodes per call."""
    model, tokenizer, drafter = pair
    config = BenchmarkConfig(len(case.prompts) * arguments.repeats, max_tokens=arguments.max_tokens)
    with hostile(Target.of(model)) if case.is_hostile else nullcontext():
        bench = Bench(model, tokenizer, drafter, None, Sampling(arguments.temp), config)
        prompts = [one.ids for one in case.prompts] * arguments.repeats
        row = summary(bench.run(prompts, None, case.name))[-1]
    names = ("prompts", "speedup", "tokens_per_call", "nodes_per_call")
    return {"case": case.name, **{name: row[name] for name in names}}


def own_drafter(name: str | None, model: Any, tokenizer: Any) -> Any:
    """Return the drafter of a name, or the bundled one that fits."""
    if name:
        return drafter_for(name, model, tokenizer)
    found = bundled_drafter(model, tokenizer)
    if found is None:
        raise SystemExit("no bundled drafter fits the model; name one with --drafter")
    return found[1]


def main() -> int:
    """Print the ratio of every case; return 1 if one is too low."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=bundled("stories-14m"))
    parser.add_argument("--drafter", help="folder, hub repository or ngram (default: the bundled)")
    parser.add_argument("--data", default=PROMPTS, help="JSONL rows with prompt, turns or text")
    parser.add_argument("--context", type=int, default=4096, help="of long prompts, in tokens")
    parser.add_argument("--num-prompts", type=int, default=6)
    parser.add_argument("--per-class", type=int, default=3, help="prompts of each class")
    parser.add_argument("--num-long", type=int, default=2, help="prompts with a long context")
    parser.add_argument("--repeats", type=int, default=3, help="answers to every prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--only", default="", help="leave out cases whose names lack this")
    parser.add_argument("--results", type=Path, help="write JSON with every case to this file")
    arguments = parser.parse_args()
    model, tokenizer = mlx_distill.load(arguments.model)
    limit = Target.of(model).context or 10**9
    short = in_turn(read_asked(arguments.data, tokenizer, prompt_tokens=min(512, limit // 2)))
    pairs: dict[tuple[bool, bool], Any] = {}
    rows: list[Row] = []
    for case in cases(short, arguments, limit - arguments.max_tokens - 32):
        if arguments.only not in case.name:
            continue
        kind = case.drafts, case.is_hostile
        if kind not in pairs:  # what costs something else is calibrated by itself
            os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
            make = own_drafter if case.drafts else drafter_for
            pairs[kind] = make(arguments.drafter if case.drafts else None, model, tokenizer)
        rows.append(row := measured((model, tokenizer, pairs[kind]), case, arguments))
        ratio = row["speedup"]
        print(
            f"{case.name}: {ratio['median']:.3f} ({ratio['quartile_1']:.3f} to "
            f"{ratio['quartile_3']:.3f}), {row['tokens_per_call']:.2f} tokens and "
            f"{row['nodes_per_call']:.1f} nodes per call",
            flush=True,
        )
    if arguments.results:
        settings = {name: shown(str(value)) for name, value in vars(arguments).items()}
        result = {"settings": settings, "cases": rows, **machine.provenance()}
        write_whole(arguments.results, json.dumps(result, indent=1) + "\n")
    return int(any(row["speedup"]["median"] < LEAST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
