"""Many texts at once against mlx_lm.batch_generate: tokens per second of all, at temperature 0.

    python examples/batch_speed.py --batch 4 8 --max-tokens 96
    python examples/batch_speed.py --model path-or-hub-repo --drafter my-drafter

The arms take turns in one process; a ratio is that of one turn, and its median and range are shown.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx_distill  # before mlx_lm: on Linux the BLAS comes first

# isort: split
import mlx_lm

from mlx_distill.checkpoint import bundled
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


def measure(arms: dict[str, Callable[[], int]], runs: int) -> dict[str, list[float]]:
    """Return the tokens per second of every arm, turn by turn."""
    for arm in arms.values():
        arm()  # what is compiled is compiled now
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(runs):
        for name, arm in arms.items():
            start = time.perf_counter()
            tokens = arm()
            found[name].append(tokens / (time.perf_counter() - start))
    return found


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
    for batch in arguments.batch:
        texts = [PROMPTS[place % len(PROMPTS)] for place in range(batch)]
        prompts = [encode_prompt(tokenizer, text) for text in texts]
        most = arguments.max_tokens

        def mlx_lm_alone(prompts: list[list[int]] = prompts, most: int = most) -> int:
            options = {"max_tokens": most, "return_token_ids": True}
            answers = mlx_lm.batch_generate(model, tokenizer, prompts, **options)
            return sum(map(len, answers.token_ids or []))

        def ours(drafts: bool, prompts: list[list[int]] = prompts, most: int = most) -> int:
            options = {"drafter": drafter if drafts else None, "max_tokens": most}
            answers = mlx_distill.batch_generate(
                model, tokenizer, prompts, batch=len(prompts), **options
            )
            return sum(len(answer.tokens) for answer in answers)

        arms = {
            "mlx-lm": mlx_lm_alone,
            "plain": lambda ours=ours: ours(False),
            "chosen": lambda ours=ours: ours(True),
        }
        found = measure(arms, arguments.runs)
        for name, speeds in found.items():
            ratios = [a / b for a, b in zip(speeds, found["mlx-lm"], strict=True)]
            low, median, high = min(ratios), statistics.median(ratios), max(ratios)
            speed = statistics.median(speeds)
            ratio = f"{median:.2f} ({low:.2f}-{high:.2f})"
            print(f"{batch} texts  {name:7} {speed:8.0f} tokens/s  {ratio}")


if __name__ == "__main__":
    main()
