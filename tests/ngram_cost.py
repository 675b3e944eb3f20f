"""What n-grams cost a text in which they find nothing: seconds of the same tokens, in turn.

    python tests/ngram_cost.py --data stories.jsonl --temp 1 --output ngram-cost.json

Two streams write the same text, one with n-grams and one without a drafter, eight tokens each
before the other goes on. Nothing else should run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import NGramDrafter, cli, load, machine, stream_generate
from mlx_distill.benchmarking.batches import side_by_side
from mlx_distill.checkpoint import bundled
from mlx_distill.data.prompts import read_prompts
from mlx_distill.drafters.protocol import Drafter


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
    rows = [_speeds(pair, prompt[: arguments.prompt_tokens], arguments) for prompt in prompts][1:]
    low, middle, high = statistics.quantiles([row["with"] / row["without"] for row in rows], n=4)
    whole = sum(1 / row["without"] for row in rows) / sum(1 / row["with"] for row in rows)
    print(f"with n-grams {whole:.3f} times as fast on all texts together;")
    print(f"text by text {middle:.3f} ({low:.3f}-{high:.3f})")
    if arguments.output:
        asked = ("num_prompts", "prompt_tokens", "max_tokens", "temp")
        settings = {name: getattr(arguments, name) for name in asked}
        found = {"rows": rows, "settings": settings, **machine.provenance()}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _speeds(pair: tuple[Any, Any], prompt: list[int], arguments: Any) -> dict[str, float]:
    """Return a text's tokens per second with n-grams and without, behind the first of them."""

    def written(drafter: Drafter | None) -> Iterator[int]:
        options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temp, "seed": 1}
        for _ in stream_generate(*pair, prompt, drafter=drafter, **options):
            yield 1

    writing = {"with": written(NGramDrafter()), "without": written(None)}
    for stream in writing.values():
        next(stream)
    return side_by_side(writing)


if __name__ == "__main__":
    sys.exit(main())
