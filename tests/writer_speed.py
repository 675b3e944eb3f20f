"""What writes a student's texts fastest: the writer of answers, or batch_generate.

    python tests/writer_speed.py --model models/stories-4m --data stories.jsonl --texts 64

All write as many texts at once at temperature 1, in turn; a ratio is to the writer of answers,
which `distillation/on_policy.py` uses. Nothing else should run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from mlx_distill import NGramDrafter, cli, load
from mlx_distill.checkpoint import bundled
from mlx_distill.data.prompts import read_prompts
from mlx_distill.distillation.answer_batch import Wanted, written
from mlx_distill.distillation.drafted_answers import drafted

TURNS = 5  # that count; one before them compiles what is compiled


def main(argv: Sequence[str] | None = None) -> int:
    """Time the ways and print them; return the exit status."""
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(bundled("stories-4m")), help="the student")
    parser.add_argument("--data", required=True, help="JSONL of prompts")
    parser.add_argument("--texts", type=int, default=64, help="written at once (default: 64)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of each (default: 16)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of each (default: 48)")
    arguments: argparse.Namespace = parser.parse_args(argv)
    model, tokenizer = load(arguments.model)
    prompts = read_prompts(arguments.data, tokenizer)[: arguments.texts]
    most, rows, ends = arguments.max_tokens, len(prompts), set(tokenizer.eos_token_ids)
    wanted = [
        Wanted(prompt[: arguments.prompt_tokens], most, 1.0, seed)
        for seed, prompt in enumerate(prompts)
    ]
    ways: dict[str, Callable[[], Iterator[tuple[int, list[int]]]]] = {
        "writer of answers": lambda: written(model, wanted, ends, rows),
        "batch_generate": lambda: drafted(model, tokenizer, None, wanted, rows),
        "batch_generate, n-grams": lambda: drafted(
            model,
            tokenizer,
            NGramDrafter(),
            wanted,
            rows,  # a new one knows no turn before
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, write in ways.items():
            start = time.perf_counter()
            tokens = sum(len(answer) for _, answer in write())
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - start))
    first, *_ = speeds.values()
    for name, found in speeds.items():
        ratios = [one / other for one, other in zip(found, first, strict=True)]
        middle = statistics.median(ratios)
        print(f"{name:24} {statistics.median(found):6.0f} tokens/s  ", end="")
        print(f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
