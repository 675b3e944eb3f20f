"""How long a command takes to its first token, beside mlx_lm.generate's.

    python tests/start_time.py                      the bundled model
    python tests/start_time.py --model FOLDER --rounds 5

Processor seconds and seconds on the clock: medians of runs that take turns. What is measured once
and remembered (costs, what the model supports) is there already: a run before those counts not.
Not collected by pytest: it measures time, so nothing else may run meanwhile.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from mlx_distill.checkpoint import bundled
from mlx_distill.cli import command
from mlx_distill.errors import InputError

# An installed package is compiled once, whoever measures it.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run(argv: Sequence[str]) -> tuple[float, float]:
    """Return the processor's and the clock's seconds of a command.

    Raises:
        InputError: If it fails.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    took_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise InputError(f"{' '.join(argv)} failed: {done.stderr.strip()[-300:]}")
    return sum(after[:2]) - sum(before[:2]), took_s


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a row per command; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(bundled("stories-14m")))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise InputError(f"rounds must be at least 1, got {arguments.rounds}")
    asked = ["--model", arguments.model, "--prompt", "Once upon a time", "--max-tokens", "1"]
    arms = {
        "mlx_lm generate": ["-m", "mlx_lm", "generate", *asked],
        "drafted": ["-m", "mlx_distill.generate", *asked],
        "plain": ["-m", "mlx_distill.generate", "--no-drafter", *asked],
        "import of mlx_lm": ["-c", "import mlx_lm.generate"],
        "import of mlx_distill": ["-c", "import mlx_distill.generate"],
    }
    for one in arms.values():
        run(one)
    rounds = [{name: run(one) for name, one in arms.items()} for _ in range(arguments.rounds)]
    medians = {
        name: [
            statistics.median(times) for times in zip(*(one[name] for one in rounds), strict=True)
        ]
        for name in arms
    }
    first = medians["mlx_lm generate"]
    for name, (cpu_s, took_s) in medians.items():
        ratios = f"({cpu_s / first[0]:.2f} x)  {took_s:5.2f} s ({took_s / first[1]:.2f} x)"
        print(f"{name:22} {cpu_s:5.2f} CPU s {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
