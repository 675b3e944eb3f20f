"""What n-grams cost a text in which they find nothing: seconds of the same tokens, in turn.

    python tests/ngram_cost.py --data stories.jsonl --temp 1 --output ngram-cost.json

Two streams write the same text, one with n-grams and one without a drafter, eight tokens each
before the other goes on. Nothing else should run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import NGramDrafter, cli, load, machine, stream_generate  # a fast BLAS first

# isort: split
import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_distill.checkpoint import bundled
from mlx_distill.data.prompts import read_prompts

TOKENS = 8  # of a turn


def main(argv: Sequence[str] | None = None) -> int:
    """Write all texts, print the ratio, and keep it; return the exit status."""
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(bundled("stories-14m")), help="the target")
    parser.add_argument("--data", required=True, help="JSONL of prompts")
    parser.add_argument("--num-prompts", type=int, default=20, help="texts (default: 20)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each (default: 96)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default: 0)")
    parser.add_argument("--output", type=Path, help="write everything there, as JSON")
    arguments: argparse.Namespace = parser.parse_args(argv)
    pair = load(arguments.model)
    prompts = read_prompts(arguments.data, pair[1])[: arguments.num_prompts + 1]
    rows = [_costs(pair, prompt[: arguments.prompt_tokens], arguments) for prompt in prompts][1:]
    ratios = [row["without_s"] / row["with_s"] for row in rows]
    low, middle, high = statistics.quantiles(ratios, n=4)
    whole = sum(row["without_s"] for row in rows) / sum(row["with_s"] for row in rows)
    drafted = sum(row["drafted"] for row in rows)
    print(
        f"with n-grams {whole:.3f} times as fast on all texts together, {drafted} tokens drafted;"
    )
    print(f"text by text {middle:.3f} ({low:.3f}-{high:.3f})")
    if arguments.output:
        asked = ("num_prompts", "prompt_tokens", "max_tokens", "temp")
        settings = {name: getattr(arguments, name) for name in asked}
        found = {"rows": rows, "settings": settings, **machine.provenance()}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _costs(pair: tuple[Any, Any], prompt: list[int], arguments: Any) -> dict[str, float]:
    """Return the seconds that a text takes with n-grams and without, less those of its prompt."""
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temp, "seed": 1}
    streams: dict[str, Iterator[Any]] = {
        "with_s": stream_generate(*pair, prompt, drafter=NGramDrafter(), **options),
        "without_s": stream_generate(*pair, prompt, **options),
    }
    for stream in streams.values():
        next(stream)
    seconds, drafted, order = dict.fromkeys(streams, 0.0), 0, list(streams)
    alive = set(order)
    while alive:
        for name in order:
            start = time.perf_counter()
            for _ in range(TOKENS if name in alive else 0):
                response = next(streams[name], None)
                if response is None:
                    alive.discard(name)
                    break
                drafted = max(drafted, response.drafted_tokens)
            mx.synchronize(generation_stream)  # or a step would go on in the other's time
            seconds[name] += time.perf_counter() - start
        order.reverse()
    return {**seconds, "drafted": drafted}


if __name__ == "__main__":
    sys.exit(main())
