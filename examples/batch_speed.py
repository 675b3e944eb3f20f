"""Many texts at once against mlx_lm.batch_generate: tokens per second of all, at temperature 0.

    python examples/batch_speed.py --batch 4 8 --max-tokens 96
    python examples/batch_speed.py --model path-or-hub-repo --drafter my-drafter

The arms write side by side in one process, some steps each in turn; a ratio is that of whole texts,
and its median and range are shown.
``python -m mlx_distill.benchmark --batch 4 8`` measures the same with prompts of a file.
"""

import argparse

import mlx_distill
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.batches import batch_lines, batches
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import GREEDY
from mlx_distill.data.prompts import encode_prompt

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


def main() -> None:
    """Measure and print a line per arm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(bundled("stories-14m")))
    parser.add_argument("--drafter", default=str(bundled("stories-14m-redrafter")))
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = mlx_distill.load(arguments.model)
    drafter = mlx_distill.load_drafter(arguments.drafter, model, tokenizer)
    config = BenchmarkConfig(max_tokens=arguments.max_tokens)
    bench = Bench(model, tokenizer, drafter, None, GREEDY, config)
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    for line in batch_lines(batches(bench, prompts, arguments.batch, arguments.runs)):
        print(line)


if __name__ == "__main__":
    main()
