"""Reproduce the published figures of drafting on Macs, and beat them; any target and drafter.

    python examples/benchmark_m2_ultra.py --model M --drafter D --data question.jsonl --output run

In every precision and at every temperature two things are measured: drafting as this machine's own
measurements shape it (best-first trees), and whole beams over the widths and lengths of the
published sweeps; both beside plain mlx-lm and, with --draft-model, beside mlx-lm's own drafting.
``--data`` may hold classes of prompts, as Spec-Bench's question.jsonl does: they take turns.

The script says how long it will take before it begins. A run that was stopped goes on where it was
with the same command. It ends in report.html. Close other programs, plug the machine in, and leave
it alone meanwhile. Without --model it runs the bundled pair.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import InputError, benchmark, cli

# isort: split
import mlx_lm

from mlx_distill.benchmark import PROMPTS
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.precisions import PRECISIONS, in_precision
from mlx_distill.checkpoint import bundled, local_folder
from mlx_distill.core.sampling import Temperature
from mlx_distill.data.sources import check_sources, read_rows
from mlx_distill.drafters.registry import AUTO, NGRAM
from mlx_distill.files import output_path, write_whole
from mlx_distill.limits import Between, Count, check_value
from mlx_distill.locks import locked

# Of the published sweeps; their beam lengths are one more, since they count the certain token.
WIDTHS, LENGTHS = ("1", "2", "3", "4"), ("1", "2", "3", "4")
# After a growing context every arm writes 32 tokens four times at up to so many lengths, from 128
# on, and reads the text before: on these machines at about ten times the speed of writing.
GROWTH_RUNS, GROWTH_TOKENS, READING = 4, 32, 10


@dataclass(frozen=True)
class Step:
    """One benchmark of the run.

    Args:
        name: Of its result.
        model: The converted model's folder.
        flags: Of ``mlx_distill.benchmark``.
        tokens: That it decodes, all arms together, at most.
    """

    name: str
    model: Path
    flags: tuple[str, ...]
    tokens: int


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, estimate, measure what is not measured yet, report; return the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.model and not arguments.drafter:
        raise InputError("a model of your own needs a drafter; name one with --drafter")
    _check(arguments)
    folder = output_path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "running"):
        _keep_settings(folder, arguments)
        models = {name: _converted(arguments, name, folder) for name in arguments.precisions}
        steps = [step for name, model in models.items() for step in _steps(arguments, name, model)]
        left = [step for step in steps if not _result(folder, step).exists()]
        if left:
            _measure(folder, left, arguments)
        report = folder / "report.html"
        report.unlink(missing_ok=True)
        results = [str(_result(folder, step)) for step in steps]
        status = benchmark.main(["--results", *results, "--report", str(report)])
        if status == 0:
            print(f"The report is {report}")
        return status


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError for what would otherwise be found out after the models are converted."""
    config = BenchmarkConfig(
        num_prompts=arguments.num_prompts,
        max_tokens=arguments.max_tokens,
        warm_up_s=arguments.warm_up,
        sweep_prompts=min(arguments.sweep_prompts, arguments.num_prompts),
        sweep_widths=tuple(map(int, arguments.widths)),
        sweep_lengths=tuple(map(int, arguments.lengths)),
    )
    check_value("growth", arguments.growth, Count)
    check_value("cool_down", arguments.cool_down, Annotated[float, Between(0, 3600)])
    for temperature in arguments.temperatures:
        check_value("temperatures", temperature, Temperature)
    data = arguments.data or PROMPTS
    check_sources([data])
    rows = sum(1 for _ in read_rows(data))
    if rows < config.num_prompts:
        raise InputError(
            f"{config.num_prompts} prompts were asked for, {data} has {rows}; say --num-prompts"
        )
    parts = (arguments.drafter or "").split("+")
    for name in (*parts, arguments.draft_model):
        if name and name not in (NGRAM, AUTO):
            local_folder(name)


def _whole(text: str) -> str:
    """Return the text of a whole number; argparse's type of such flags."""
    return str(int(text))


def _keep_settings(folder: Path, arguments: argparse.Namespace) -> None:
    """Write down what is asked for, or raise InputError if the folder holds something else."""
    asked = {name: value for name, value in vars(arguments).items() if name != "output"}
    settings = json.dumps(asked, indent=1) + "\n"
    path = folder / "settings.json"
    if path.exists() and path.read_bytes() != settings.encode():
        raise InputError(f"{folder} holds a run with other settings; name another --output")
    if not path.exists() and any(child.suffix == ".json" for child in folder.iterdir()):
        raise InputError(f"{folder} holds results of something else; name another --output")
    write_whole(path, settings)


def _converted(arguments: argparse.Namespace, precision: str, folder: Path) -> Path:
    return in_precision(
        str(arguments.model or bundled("stories-14m")), precision, folder / "models"
    )


def _steps(arguments: argparse.Namespace, precision: str, model: Path) -> Iterator[Step]:
    """Yield the benchmarks of one precision."""
    prompts, arms = arguments.num_prompts, 4 if arguments.draft_model else 2
    swept = min(arguments.sweep_prompts, prompts)
    cells = len(arguments.widths) * len(arguments.lengths)
    for temperature in dict.fromkeys(arguments.temperatures):
        shared = [*("--temp", str(temperature)), *("--num-prompts", str(prompts))]
        shared += ["--max-tokens", str(arguments.max_tokens)]
        shared += ["--warm-up-s", str(arguments.warm_up), "--timed-prompts", str(min(4, prompts))]
        shared += ["--sweep-prompts", str(swept)]
        sweep = ["--sweep-widths", *arguments.widths, "--sweep-lengths", *arguments.lengths]
        sweep = sweep if swept else []
        for name in ("draft_model", "data"):
            if getattr(arguments, name):
                shared += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
        drafter = arguments.drafter or str(bundled("stories-14m-redrafter"))
        shared += ["--drafter", drafter]
        decoded = (prompts + 1) * arms + 8 * min(4, prompts) + cells * (swept + 1) * 2
        tokens = arguments.max_tokens * decoded
        title = f"{precision}-T{temperature:g}"
        growth = ("--growth", str(arguments.growth))
        lengths = max(1, (arguments.growth // 128).bit_length())
        grown = lengths * GROWTH_TOKENS + 2 * arguments.growth // READING
        planned = tokens + arms * GROWTH_RUNS * grown
        yield Step(f"{title}-planned", model, (*shared, *sweep, *growth), planned)
        whole = ("--tree", "beam", "--sharing")
        yield Step(f"{title}-beams", model, (*shared, *sweep, *whole), tokens)


def _result(folder: Path, step: Step) -> Path:
    return folder / f"{step.name}.json"


def _measure(folder: Path, steps: Sequence[Step], arguments: argparse.Namespace) -> None:
    """Measure what is left; say before how long it takes, and after each what is left of that."""
    speeds = {model: _plain_speed(model) for model in {step.model: None for step in steps}}
    pauses = arguments.cool_down + arguments.warm_up
    estimates = [step.tokens / speeds[step.model] + pauses for step in steps]
    for model, speed in speeds.items():
        print(f"{model.name}: plain mlx-lm writes {speed:.1f} tokens/s")
    print(f"{len(steps)} benchmarks, about {_duration(sum(estimates))}", flush=True)
    taken = 0.0
    for number, step in enumerate(steps, start=1):
        start = time.monotonic()
        time.sleep(arguments.cool_down)
        print(f"--- {step.name} ({number} of {len(steps)})", flush=True)
        result, page = _result(folder, step), folder / f"{step.name}.html"
        page.unlink(missing_ok=True)  # of a run that was stopped; its result comes first
        more = ["--report", str(page)] if step.name.endswith("planned") else []
        flags = ["--model", str(step.model), *step.flags, "--output", str(result), *more]
        if benchmark.main(flags):
            raise InputError(f"{step.name} could not be measured; what was, is kept")
        taken += time.monotonic() - start
        ahead = sum(estimates[number:]) * taken / sum(estimates[:number])
        if number < len(steps):
            print(f"{_duration(taken)} so far, about {_duration(ahead)} to go", flush=True)


def _plain_speed(model: Path) -> float:
    """Return the tokens per second of mlx-lm's own loop, in a short trial."""
    network, tokenizer = mlx_distill.load(model)
    speed = 1.0
    for response in mlx_lm.stream_generate(network, tokenizer, "Once upon a time", 24):
        speed = response.generation_tps
    return max(speed, 1e-3)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=cli.path, help="folder or hub name, in full precision")
    cli.add_drafter_flag(parser)
    parser.add_argument("--draft-model", type=cli.path, help="a small model for mlx-lm's drafting")
    parser.add_argument("--data", type=cli.path, help="JSONL of prompts, with classes or without")
    parser.add_argument("--output", type=cli.path, required=True, help="folder of the results")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=["fp16", "8-bit", "4-bit", "mxfp8", "mxfp4"],
        help="of the target (default: %(default)s)",
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    for name, default, told in (
        ("num-prompts", 24, "prompts per benchmark"),
        ("sweep-prompts", 3, "prompts per cell of a sweep"),
        ("max-tokens", 200, "longest answer, in tokens"),
        ("growth", 4096, "longest context of the study of contexts, in tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} ({default})")
    for name, default, told in (
        ("widths", WIDTHS, "beam widths"),
        ("lengths", LENGTHS, "drafted tokens"),
    ):
        parser.add_argument(f"--{name}", type=_whole, nargs="+", default=list(default), help=told)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds before each (10)")
    parser.add_argument("--cool-down", type=float, default=30.0, help="idle seconds before (30)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
