"""Measure drafting against mlx-lm on this machine, in one process, arms interleaved.

    python -m mlx_distill.benchmark --output results.json
    python -m mlx_distill.benchmark --report report.html
    python -m mlx_distill.benchmark --batch 4 8
    python -m mlx_distill.benchmark --dispatches
    python -m mlx_distill.benchmark --profile --trace trace.json

Every prompt is decoded by every arm in turn: mlx-lm alone, mlx-lm with a draft model if one is
named, and drafting. The speed-up is the median over prompts of the ratio on the same prompt, so
that a machine whose speed drifts does not decide. Nothing else should run meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill import cli, machine
from mlx_distill.benchmarking.arms import Bench, settled
from mlx_distill.benchmarking.batches import batch_lines, batches
from mlx_distill.benchmarking.benchmark import Studies, check_draft_model, run, usable
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.dispatch_study import study
from mlx_distill.benchmarking.page import page
from mlx_distill.benchmarking.plot import plot
from mlx_distill.benchmarking.profile import profile, run_profile
from mlx_distill.benchmarking.samplers import sampler_times
from mlx_distill.benchmarking.table import (
    loss_sentence,
    show,
    show_dispatches,
    show_profile,
    show_samplers,
)
from mlx_distill.benchmarking.trace import trace
from mlx_distill.calibration.pair import Pair
from mlx_distill.config import add_flags, from_flags
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import Asked, in_turn, read_asked
from mlx_distill.data.report import Report
from mlx_distill.data.sources import check_sources
from mlx_distill.distillation.loss_memory import loss_memory
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.bound import settle
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.files import read_json, usable_path, write_new
from mlx_distill.limits import Count, check_value
from mlx_distill.speculation.requests import BatchSize
from mlx_distill.target.target import Target

WRITTEN = ("output", "plot", "trace", "report")
# What a page shows beside what its command asks for.
PAGE_GROWTH, PAGE_TREES, PAGE_SWEEP = 4096, 3, 2
# What is done instead of a benchmark, and what is measured in one beside the speed.
LONE = "results", "dispatches", "batch", "profile", "loss_memory", "samplers"
BESIDE = "sharing", "long_run", "growth", "sweep_prompts", "plot"
PROMPTS = Path(__file__).parent / "data" / "story_openings.jsonl"


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    _check_studies(arguments)
    if arguments.report and not arguments.sweep_prompts and not _given(arguments, LONE):
        arguments.sweep_prompts = min(PAGE_SWEEP, arguments.num_prompts)
    config = from_flags(BenchmarkConfig, arguments)
    plan = cli.asked_shape(_parser(), argv, arguments)
    sampling = from_flags(Sampling, arguments)
    files = cli.new_files(arguments, WRITTEN)
    _check(arguments, config)
    _refuse_unused(argv, arguments)
    if arguments.results:
        _write(files["report"], page([_earlier(name) for name in arguments.results]))
        return 0
    if arguments.loss_memory or arguments.samplers:
        found, tell = _without_models(arguments)
        _write(files["output"], found | machine.provenance())
        tell()
        return 0
    bench, asked, report = _open(arguments, config, sampling)
    shape, timed = plan or DraftPlan(), [one.ids for one in asked[: config.timed_prompts]]
    result: dict[str, Any] = {"config": cli.settings(arguments), **machine.provenance()}
    if arguments.dispatches:
        pair = bench.model, bench.tokenizer, bench.drafter
        result |= study(*pair, timed[0], shape, others=arguments.model is None)
        tell = partial(show_dispatches, result)
    elif arguments.batch:
        prompts = [one.ids for one in asked]
        result["batches"] = batches(bench, prompts, arguments.batch)
        tell = partial(print, "\n".join(batch_lines(result["batches"])))
    elif arguments.profile:
        runs = run_profile(bench, timed, shape)
        result |= profile(bench, timed, shape, runs)
        tell = partial(show_profile, result)
        _write(files["trace"], trace(runs[0]))
    else:
        result |= run(bench, asked, plan, _studies(arguments)) | {"rows": report.to_dict()}
        tell = partial(show, result)
    _write(files["output"], result)
    if files["report"]:
        _write(files["report"], page([result]))
    if files["plot"]:
        title = f"{result['machine']['processor']}, temperature {sampling.temperature:g}"
        plot(result["sweep"], title, files["plot"])
    tell()  # at last, for nobody may be reading it
    return 0


def _earlier(name: str) -> dict[str, Any]:
    """Return a result that was written before; InputError, with its name, if it is none."""
    result = read_json(usable_path(name, "the results"))
    try:
        page([result])
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return result


def _without_models(arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], None]]:
    """Measure what a large vocabulary costs, for which no model is needed; return what shows it."""
    if arguments.samplers:
        num_rows, num_entries = arguments.samplers
        times = sampler_times(num_rows, num_entries)
        found = {"rows": num_rows, "entries": num_entries, "samplers": times}
        return found, partial(show_samplers, num_rows, num_entries, times)
    num_tokens, num_entries = arguments.loss_memory
    found = loss_memory(num_tokens, num_entries)
    return found, partial(print, loss_sentence(num_tokens, num_entries, found))


def _studies(arguments: argparse.Namespace) -> Studies:
    """Return what is measured beside the arms; a page shows more than a table."""
    growth = arguments.growth or (PAGE_GROWTH if arguments.report else None)
    trees = PAGE_TREES if arguments.report else 0
    on_a_page = bool(arguments.report)
    return Studies(arguments.sharing, arguments.long_run, growth, trees, on_a_page)


def _check(arguments: argparse.Namespace, config: BenchmarkConfig) -> None:
    """Raise InputError if arguments cannot be used; before anything is loaded."""
    check_value("long_run", arguments.long_run, Count | None)
    for name in ("loss_memory", "samplers"):
        if getattr(arguments, name):
            _check_table(name, *getattr(arguments, name))
    check_value("growth", arguments.growth, Count | None)
    picture = arguments.plot
    if picture and Path(picture).suffix != ".png":
        raise InputError(f"--plot writes a PNG; end its name with .png, got {arguments.plot}")
    if picture and not config.sweep_prompts:
        raise InputError("--plot draws the sweep; ask for one with --sweep-prompts")
    if arguments.trace and not arguments.profile:
        raise InputError("--trace writes what --profile times; ask for that, too")
    check_value("batch", arguments.batch, tuple[BatchSize, ...] | None)
    if arguments.batch and arguments.temperature:
        raise InputError("--batch measures greedy texts; leave out --temp")
    alone = arguments.dispatches or arguments.batch or arguments.loss_memory or arguments.samplers
    if arguments.report and alone:
        raise InputError(
            "--report shows benchmarks and profiles, no batches, dispatches, memory or samplers"
        )
    if arguments.results and not arguments.report:
        raise InputError("--results are shown by a report; name its file with --report")
    if not arguments.results:
        check_sources([arguments.data or PROMPTS])


def _check_studies(arguments: argparse.Namespace) -> None:
    """Raise InputError if one command is to measure several things that go alone."""
    lone, beside = _given(arguments, LONE), _given(arguments, BESIDE)
    if len(lone) > 1:
        raise InputError(f"{lone[0]} and {lone[1]} go alone; ask for one at a time")
    if lone and beside:
        raise InputError(f"{lone[0]} goes alone; leave {beside[0]} out")
    if arguments.results and arguments.output:
        raise InputError("--results measures nothing; leave --output out")


def _refuse_unused(argv: Sequence[str] | None, arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag was given that nothing would look at."""
    swept = ["sweep_widths", "sweep_lengths"]
    drafting = ["draft_model", "num_draft_tokens", "draft_verification", *swept]
    alone = [
        (
            getattr(arguments, name),
            [other for other in vars(arguments) if other not in (name, used)],
            f"--{name.replace('_', '-')} loads no model",
        )
        for name, used in (("results", "report"), ("loss_memory", "output"), ("samplers", "output"))
    ]
    cli.refuse_unused(
        _parser(),
        argv,
        *alone,
        (
            arguments.batch,
            [*drafting, DraftPlan, "no_calibrate", "timed_prompts", "warm_up_s"],
            "--batch shapes its drafts itself",
        ),
        (
            arguments.dispatches,
            [*drafting, Sampling, "warm_up_s"],
            "--dispatches times nothing and takes both laws",
        ),
        (arguments.profile, [*drafting, "warm_up_s"], "--profile times the drafter alone"),
        (
            not (arguments.sweep_prompts or arguments.report),
            [*swept],
            "nothing is swept without --sweep-prompts",
        ),
    )


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the flags among some that were given."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]


def _check_table(name: str, num_rows: int, num_entries: int) -> None:
    check_value(name, (num_rows, num_entries), tuple[Count, ...])
    needed = 4 * 4 * num_rows * num_entries  # logits, perhaps two, and what is made of them
    if needed > machine.memory_bytes():
        raise InputError(
            f"{name} of {num_rows:,} rows x {num_entries:,} entries takes about "
            f"{needed / 1e9:,.0f} GB, this machine has {machine.memory_bytes() / 1e9:.1f}"
        )


def _open(
    arguments: argparse.Namespace, config: BenchmarkConfig, sampling: Sampling
) -> tuple[Bench, list[Asked], Report]:
    """Return the loaded pair, its prompts, and what became of the rows."""
    template_config = cli.template_config(arguments)
    model, tokenizer = cli.load_model(arguments)
    drafter = cli.need_drafter(arguments, model, tokenizer)
    settle(drafter)
    draft_model = cli.load_draft_model(arguments, tokenizer)
    check_draft_model(model, draft_model)
    report = Report(noun="prompts")
    prompts = read_asked(
        arguments.data or PROMPTS,
        tokenizer,
        prompt_tokens=config.prompt_tokens,
        chat_template=not arguments.ignore_chat_template,
        template_config=template_config,
        report=report,
    )
    prompts = usable(model, in_turn(prompts), config, report)
    if report.dropped:
        print("\n".join(report.lines()), file=sys.stderr)
    sampling.check_vocabulary(Target.of(model).vocab_size)
    if isinstance(drafter, AutoDrafter):
        ids = [one.ids for one in prompts]
        found = settled(Pair(model, tokenizer, drafter), sampling, ids, config.max_tokens)
        arm = found.trial.chosen or found.trial.best
        # What loses is measured all the same: there is nothing else to be told.
        arm = arm if drafter.arms[arm] else next(iter(drafter.arms))
        short = f"the answers are too short for a trial; {drafter.title(arm)} is measured"
        print(found.sentence() if found.trial.chosen else short, file=sys.stderr)
        drafter = drafter.arms[arm] or drafter.first
    return Bench(model, tokenizer, drafter, draft_model, sampling, config), prompts, report


def _write(output: Path | None, result: dict[str, Any] | str) -> None:
    """Write a page or a trace as it is, and a result as JSON, to a file that was asked for."""
    if output:
        text = result if isinstance(result, str) else json.dumps(result, indent=1) + "\n"
        write_new(output, text)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.benchmark",
        description="Measure drafting against mlx-lm on this machine.",
    )
    cli.add_model_flags(parser)
    cli.add_drafter_flag(parser)
    parser.add_argument(
        "--draft-model",
        type=cli.path,
        help="a small model that drafts, in mlx-lm's loop and in this one, as two arms "
        "(default: none)",
    )
    parser.add_argument(
        "--data",
        type=cli.path,
        help="JSONL of held-out prompts (default: 48 story openings of our own)",
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use prompts as they are"
    )
    add_flags(parser, BenchmarkConfig)
    add_flags(parser, Sampling, {"temperature": "temp"})
    cli.add_shape_flags(parser)
    _add_study_flags(parser)
    _add_lone_study_flags(parser)
    _add_output_flags(parser)
    return parser


def _add_study_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured beside the speed."""
    parser.add_argument(
        "--sharing", action="store_true", help="also measure what shared prefixes save"
    )
    parser.add_argument(
        "--long-run",
        type=int,
        metavar="TOKENS",
        help="also write so many tokens, at least 1, for the memory (default: none)",
    )
    parser.add_argument(
        "--growth",
        type=int,
        metavar="TOKENS",
        help="also measure speed and memory after texts of up to so many tokens, at least 1 "
        "(default: not measured; 4096 with --report)",
    )


def _add_lone_study_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured instead of the speed."""
    parser.add_argument(
        "--loss-memory",
        type=int,
        nargs=2,
        metavar=("TOKENS", "ENTRIES"),
        help="measure only the memory of a distillation loss over so large a vocabulary, both at "
        "least 1 (default: not measured)",
    )
    parser.add_argument(
        "--samplers",
        type=int,
        nargs=2,
        metavar=("ROWS", "ENTRIES"),
        help="time only draws from so many rows of so large a vocabulary, and mlx-lm's samplers, "
        "both at least 1 (default: not measured)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="TEXTS",
        help="measure only so many greedy texts at once, each from 1 to 1024, against mlx-lm's own "
        "batches (default: not measured)",
    )
    parser.add_argument(
        "--dispatches",
        action="store_true",
        help="count only the operations that a GPU would be sent, on any machine, for the pair, "
        "and without --model for models of other architectures, too",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time only the parts of a cycle, over the timed prompts: what each takes alone, its "
        "dispatches, and what it would take at least at this machine's measured speeds",
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of where it all goes."""
    parser.add_argument(
        "--trace",
        type=cli.path,
        help="write the profile's first prompt to this JSON file, which Perfetto and "
        "chrome://tracing open; it must not exist",
    )
    parser.add_argument(
        "--report",
        type=cli.path,
        help="write everything as one HTML page to this file, which must not exist; more is "
        "measured for it: a growing context, a profile, what calls cost, and a sweep of 2 prompts "
        "unless --sweep-prompts asks for another",
    )
    parser.add_argument(
        "--results",
        type=cli.path,
        nargs="+",
        metavar="FILE",
        help="measure nothing, and make the report of these results of benchmark and calibrate",
    )
    parser.add_argument(
        "--output", type=cli.path, help="write the results to this JSON file; it must not exist"
    )
    parser.add_argument(
        "--plot", type=cli.path, help="draw the sweep to this PNG file; it must not exist"
    )


if __name__ == "__main__":
    sys.exit(main())
