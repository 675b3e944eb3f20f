"""What a call of a model takes with a few rows: by a BLAS, by our own products, and with powers.

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

# By whether our products are used, and powers.
ARMS = {"OpenBLAS": ("0", False), "own products": ("1", False), "and powers": ("1", True)}


Times = dict[int, list[float]]


def measure(model: str, rows: list[int], context: int, rounds: int) -> list[Times]:
    """Return the milliseconds of calls behind a context, by their rows, interleaved.

    Without powers, and with them.
    """
    import mlx.core as mx
    from mlx_lm.utils import load

    from mlx_distill.core.prefix_tree import PrefixTree
    from mlx_distill.kernels import exponentials
    from mlx_distill.target.prompt_cache import prompt_caches
    from mlx_distill.target.target import Target

    loaded = load(model)[0]
    loaded.set_dtype(mx.float32)
    target, caches = Target.of(loaded), prompt_caches(loaded)
    target.forward(mx.arange(100, 100 + context), caches)
    trees = {}
    for number in rows:  # a node's children are twice as far
        parents = mx.maximum(mx.arange(number) - 1, 0) // 2
        tokens = mx.arange(300, 300 + number)
        trees[number] = PrefixTree.from_parents(tokens, parents, number.bit_length())
    times: list[Times] = [{number: [] for number in rows} for _ in range(2)]
    for turn in range(rounds + 1):
        for number in rows:
            for taken in (False, True):
                exponentials.by_powers = lambda taken=taken: taken
                mx.eval(trees[number].mask, [cache.state for cache in caches])
                start = time.perf_counter()
                call = target.verify(trees[number], caches)
                mx.eval(call.logits)
                if turn:
                    times[taken][number].append(1e3 * (time.perf_counter() - start))
                call.commit([0])
                call.rewind(0)
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
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for _ in range(args.processes):
        for switch in "01":
            command = [sys.executable, __file__, "--once", *sys.argv[1:]]
            environment = os.environ | {SWITCH: switch}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            measured = json.loads(done.stdout)
            for arm, (products, taken) in ARMS.items():
                if products == switch:
                    for number, one in measured[taken].items():
                        found[arm].setdefault(number, []).extend(one)
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
