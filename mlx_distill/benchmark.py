"""Measure drafting against mlx-lm on this machine, in one process, arms interleaved.

    python -m mlx_distill.benchmark --output results.json
    python -m mlx_distill.benchmark --dispatches
    python -m mlx_distill.benchmark --profile --trace trace.json

Every prompt is decoded by every arm in turn: mlx-lm alone, mlx-lm with a draft model if one is
named, and drafting. The speed-up is the median over prompts of the ratio on the same prompt, so
that a machine whose speed drifts does not decide. Nothing else should run meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_distill import cli, machine
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.benchmark import Studies, check_draft_model, run, usable
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.dispatch_study import study
from mlx_distill.benchmarking.plot import plot
from mlx_distill.benchmarking.profile import profile, run_profile
from mlx_distill.benchmarking.table import loss_sentence, show, show_dispatches, show_profile
from mlx_distill.benchmarking.trace import trace
from mlx_distill.checkpoint import bundled
from mlx_distill.config import add_flags, from_flags
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import read_prompts
from mlx_distill.data.report import Report
from mlx_distill.data.sources import check_sources
from mlx_distill.distillation.loss_memory import loss_memory
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.files import write_whole
from mlx_distill.limits import Count, check_value
from mlx_distill.target.target import Target

PROMPTS = Path(__file__).parent / "data" / "story_openings.jsonl"


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(BenchmarkConfig, arguments)
    plan = cli.asked_shape(_parser(), argv)
    sampling = from_flags(Sampling, arguments)
    output, picture = cli.new_file(arguments.output), cli.new_file(arguments.plot)
    traced = cli.new_file(arguments.trace)
    _check(arguments, config, picture)
    if arguments.loss_memory:
        num_tokens, num_entries = arguments.loss_memory
        found = loss_memory(num_tokens, num_entries)
        print(loss_sentence(num_tokens, num_entries, found))
        _write(output, found | machine.provenance())
        return 0
    bench, prompts, report = _open(arguments, config, sampling)
    if arguments.dispatches:
        pair = bench.model, bench.tokenizer, bench.drafter
        found = study(*pair, prompts[0], plan or DraftPlan(), others=arguments.model is None)
        show_dispatches(found)
        _write(output, found | {"config": cli.settings(arguments)} | machine.provenance())
        return 0
    if arguments.profile:
        shape, timed = plan or DraftPlan(), prompts[: config.timed_prompts]
        runs = run_profile(bench, timed, shape)
        found = profile(bench, timed, shape, runs)
        show_profile(found)
        _write(output, found | {"config": cli.settings(arguments)} | machine.provenance())
        if traced:
            write_whole(traced, trace(runs[0]))
        return 0
    found = run(bench, prompts, plan, Studies(arguments.sharing, arguments.long_run))
    settings = {"config": cli.settings(arguments), "rows": report.to_dict()}
    result: dict[str, Any] = {**found, **settings, **machine.provenance()}
    show(result)
    _write(output, result)
    if picture:
        title = f"{result['machine']['processor']}, temperature {sampling.temperature:g}"
        plot(result["sweep"], title, picture)
    return 0


def _check(arguments: argparse.Namespace, config: BenchmarkConfig, picture: Path | None) -> None:
    """Raise InputError if arguments cannot be used; before anything is loaded."""
    check_value("long_run", arguments.long_run, Count | None)
    if arguments.loss_memory:
        _check_loss_memory(*arguments.loss_memory)
    if picture and picture.suffix != ".png":
        raise InputError(f"--plot writes a PNG; end its name with .png, got {arguments.plot}")
    if picture and not config.sweep_prompts:
        raise InputError("--plot draws the sweep; ask for one with --sweep-prompts")
    if arguments.trace and not arguments.profile:
        raise InputError("--trace writes what --profile times; ask for that, too")
    check_sources([arguments.data or PROMPTS])


def _check_loss_memory(num_tokens: int, num_entries: int) -> None:
    check_value("loss_memory", (num_tokens, num_entries), tuple[Count, ...])
    needed = 4 * 4 * num_tokens * num_entries  # logits of both, probabilities, a gradient
    if needed > machine.memory_bytes():
        raise InputError(
            f"loss_memory of {num_tokens:,} tokens x {num_entries:,} entries takes about "
            f"{needed / 1e9:,.0f} GB, this machine has {machine.memory_bytes() / 1e9:.1f}"
        )


def _open(
    arguments: argparse.Namespace, config: BenchmarkConfig, sampling: Sampling
) -> tuple[Bench, list[list[int]], Report]:
    """Return the loaded pair, its prompts, and what became of the rows."""
    template_config = cli.template_config(arguments)
    model, tokenizer = cli.load_model(arguments)
    path = arguments.drafter or (None if arguments.model else bundled("stories-14m-redrafter"))
    if path is None:
        raise InputError("a model of your own needs a drafter; name one with --drafter")
    drafter = load_drafter(path, model, tokenizer)
    draft_model = cli.load_draft_model(arguments, tokenizer)
    check_draft_model(model, draft_model)
    report = Report(noun="prompts")
    prompts = read_prompts(
        arguments.data or PROMPTS,
        tokenizer,
        prompt_tokens=config.prompt_tokens,
        chat_template=not arguments.ignore_chat_template,
        template_config=template_config,
        report=report,
    )
    prompts = usable(model, prompts, config, report)
    if report.dropped:
        print("\n".join(report.lines()), file=sys.stderr)
    sampling.check_vocabulary(Target.of(model).vocab_size)
    return Bench(model, tokenizer, drafter, draft_model, sampling, config), prompts, report


def _write(output: Path | None, result: dict[str, Any]) -> None:
    if output:
        write_whole(output, json.dumps(result, indent=1) + "\n")


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
        help="a small model for mlx-lm's own drafting, as an arm (default: none)",
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
    return parser


def _add_study_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured beside the speed, and of where it goes."""
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
        "--loss-memory",
        type=int,
        nargs=2,
        metavar=("TOKENS", "ENTRIES"),
        help="measure only the memory of a distillation loss over so large a vocabulary, both at "
        "least 1 (default: not measured)",
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
    parser.add_argument(
        "--trace",
        type=cli.path,
        help="write the profile's first prompt to this JSON file, which Perfetto and "
        "chrome://tracing open; it must not exist",
    )
    parser.add_argument(
        "--output", type=cli.path, help="write the results to this JSON file; it must not exist"
    )
    parser.add_argument(
        "--plot", type=cli.path, help="draw the sweep to this PNG file; it must not exist"
    )


if __name__ == "__main__":
    sys.exit(main())
