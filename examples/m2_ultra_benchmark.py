"""Sweep beam widths and draft lengths on a Mac, greedy and sampled, and keep the results.

python examples/m2_ultra_benchmark.py --model M --drafter D --data prompts.jsonl --output results

Whole beams are verified, as in the published sweeps on the M1 Max, M2 and M2 Ultra; add --tree
best-first for the default tree. Close other programs and plug the machine in. Without --model it
runs the bundled pair.
"""

import argparse
import sys
from pathlib import Path

from mlx_distill import benchmark


def main() -> int:
    """Run the benchmark at two temperatures; return the first status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder for the JSON and PNG files")
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0, 1.0))
    arguments, others = parser.parse_known_args()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    for temperature in arguments.temperatures:
        name = folder / f"temperature-{temperature:g}"
        status = benchmark.main(
            [
                *("--temp", str(temperature), "--tree", "beam", "--sharing"),
                *("--sweep-prompts", "5", "--sweep-widths", "1", "2", "4", "8", "16"),
                *("--sweep-lengths", "1", "2", "3", "4", "5", "6"),
                *("--output", f"{name}.json", "--plot", f"{name}.png"),
                *others,
            ]
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
