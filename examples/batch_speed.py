"""Many texts at once against mlx_lm.batch_generate: tokens per second of all, at temperature 0.

    python examples/batch_speed.py --batch 4 8 --max-tokens 96
    python examples/batch_speed.py --model path-or-hub-repo --drafter my-drafter

The arms write side by side in one process, some steps each in turn; a ratio is that of whole texts,
and its median and range are shown.
``python -m mlx_distill.benchmark --batch 4 8`` measures the same with prompts of a file.
"""

import sys
from collections.abc import Sequence

import mlx_distill
from mlx_distill import cli
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.batches import batch_lines, batches
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import GREEDY
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.limits import Count, check_value
from mlx_distill.speculation.requests import BatchSize

PROMPTS = (
    "Once upon a time",
    "The old baker forgot his hat on the way home",
    "Ben had a red kite.",
    "Lily and her mother went to the park to see the ducks",
    "Tom was a big dog who",
    "One day, a girl",
    "The cat and the bird were",
    "In the forest there lived",
)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line per arm; return the exit status."""
    parser = cli.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(bundled("stories-14m")))
    parser.add_argument("--drafter", default=str(bundled("stories-14m-redrafter")))
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args(argv)
    check_value("batch", tuple(arguments.batch), tuple[BatchSize, ...])
    check_value("runs", arguments.runs, Count)
    config = BenchmarkConfig(max_tokens=arguments.max_tokens)
    model, tokenizer = mlx_distill.load(arguments.model)
    drafter = mlx_distill.load_drafter(arguments.drafter, model, tokenizer)
    bench = Bench(model, tokenizer, drafter, None, GREEDY, config)
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    for line in batch_lines(batches(bench, prompts, arguments.batch, arguments.runs)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
