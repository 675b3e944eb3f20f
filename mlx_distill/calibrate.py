"""Measure what decoding costs on this machine, for the planner of drafts.

    python -m mlx_distill.calibrate --model ... --drafter ...

Calls of the target by rows and context, drafts by width and length, and the rest of a cycle, timed
in turn. The result is kept in the user's cache folder, where all that drafts finds it. Nothing else
should run meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from mlx_distill import cli, machine
from mlx_distill.calibration.config import CalibrationConfig
from mlx_distill.calibration.measuring import calibrate, quick_config, summary
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.report import plot, show, show_kernels
from mlx_distill.calibration.store import (
    drafter_hash,
    file_of,
    find,
    find_kernels,
    identity,
    keep,
)
from mlx_distill.config import add_flags, from_flags
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.errors import InputError
from mlx_distill.files import write_new
from mlx_distill.speculation.caching import CacheConfig


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    first_use = "--quick measures what the first use of a pair does"
    cli.refuse_unused(_parser(), argv, (arguments.quick, [CalibrationConfig], first_use))
    config = from_flags(CalibrationConfig, arguments)
    cache = from_flags(CacheConfig, arguments)
    output, picture = cli.new_files(arguments, ("output", "plot")).values()
    if picture and picture.suffix != ".png":
        raise InputError(f"--plot writes a PNG; end its name with .png, got {arguments.plot}")
    if arguments.show and (output or picture or arguments.quick):
        raise InputError("--show measures nothing; leave --output, --plot and --quick out")
    nothing = "--show measures nothing"
    cli.refuse_unused(_parser(), argv, (arguments.show, [CalibrationConfig], nothing))
    pair = _pair(arguments, cache)
    if arguments.show:
        return _show(pair)
    if arguments.quick:
        config = quick_config(pair)
    calibration = calibrate(pair, config, progress=_bar)
    known = identity(pair)
    # What is shown comes last, for nobody may be reading it.
    if keep(known, calibration, drafter_hash(pair.drafter)):
        print(f"Kept in {file_of(known)}", file=sys.stderr)
    if output:
        result: dict[str, Any] = {
            "costs": calibration.costs.to_dict(),
            "times": summary(calibration),
            "config": cli.settings(arguments),
            **machine.provenance(),
        }
        write_new(output, json.dumps(result, indent=1) + "\n")
    if picture:
        plot(calibration.costs, str(machine.description()["processor"]), picture)
    show(calibration.costs)
    show_kernels(calibration.kernels)
    return 0


def _show(pair: Pair) -> int:
    """Print what is kept for a pair; return the exit status."""
    known = identity(pair)
    costs = find(known, drafter_hash(pair.drafter))
    if costs is None:
        raise InputError("nothing is kept for this pair and machine; calibrate without --show")
    show(costs)
    show_kernels(find_kernels(known))
    return 0


def _bar(rounds: Iterable[int]) -> Iterable[int]:
    return tqdm(rounds, desc="measuring", unit="round", leave=False)


def _pair(arguments: argparse.Namespace, cache: CacheConfig) -> Pair:
    """Return the model and the drafter that the flags ask for."""
    model, tokenizer = cli.load_model(arguments)
    drafter = cli.need_drafter(arguments, model, tokenizer)
    drafter = drafter.first if isinstance(drafter, AutoDrafter) else drafter
    return Pair(model, tokenizer, drafter, cache)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.calibrate",
        description="Measure what decoding costs on this machine, for the planner of drafts.",
    )
    cli.add_model_flags(parser)
    cli.add_drafter_flag(parser)
    parser.add_argument(
        "--show",
        action="store_true",
        help="print what is kept for this pair and machine, the kernels among it, and measure "
        "nothing",
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure only what the first use of a pair does"
    )
    add_flags(parser, CalibrationConfig)
    add_flags(parser, CacheConfig)
    parser.add_argument(
        "--output", type=cli.path, help="write the times to this JSON file; it must not exist"
    )
    parser.add_argument(
        "--plot", type=cli.path, help="draw the calls to this PNG file; it must not exist"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
