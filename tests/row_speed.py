"""What a call of a model takes with a few rows, with our own products of a few rows and without.

    python tests/row_speed.py --model M [--rows 1 2 4 8 16 32] [--context 128] [--output times.json]

Each is measured in processes of their own, in turn; medians of all calls, in milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mlx_distill import machine
from mlx_distill.blas.row_products import SWITCH
from mlx_distill.checkpoint import bundled


def measure(model: str, rows: list[int], context: int, rounds: int) -> dict[int, list[float]]:
    """Return the milliseconds of calls behind a context, by their rows, interleaved."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
    from mlx_lm.utils import load

    loaded = load(model)[0]
    loaded.set_dtype(mx.float32)
    cache = make_prompt_cache(loaded)
    loaded(mx.arange(100, 100 + context)[None], cache=cache)
    times: dict[int, list[float]] = {number: [] for number in rows}
    for turn in range(rounds + 1):
        for number, taken in times.items():
            tokens = mx.arange(300, 300 + number)[None]
            mx.eval(tokens, [layer.state for layer in cache])
            start = time.perf_counter()
            mx.eval(loaded(tokens, cache=cache))
            if turn:
                taken.append(1e3 * (time.perf_counter() - start))
            trim_prompt_cache(cache, number)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(bundled("stories-14m")), help="a folder of mlx-lm's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens before the call")
    parser.add_argument("--rounds", type=int, default=8, help="calls of each, in each process")
    parser.add_argument("--processes", type=int, default=3, help="of each kind")
    parser.add_argument("--output", type=Path, help="JSON of the medians")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.model, args.rows, args.context, args.rounds)))
        return
    found: dict[str, dict[str, list[float]]] = {"OpenBLAS": {}, "own products": {}}
    for _ in range(args.processes):
        for switch, times in zip("01", found.values(), strict=True):
            command = [sys.executable, __file__, "--once", *sys.argv[1:]]
            environment = os.environ | {SWITCH: switch}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for number, taken in json.loads(done.stdout).items():
                times.setdefault(number, []).extend(taken)
    medians = {
        arm: {number: round(statistics.median(taken), 2) for number, taken in times.items()}
        for arm, times in found.items()
    }
    for arm, times in medians.items():
        print(f"{arm:14}", *(f"{number}: {taken:.1f} ms" for number, taken in times.items()))
    if args.output:
        known = {"model": Path(args.model).name, "context": args.context, "ms": medians}
        args.output.write_text(json.dumps(known | machine.provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
