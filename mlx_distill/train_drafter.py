"""Train a drafter for a model: the model writes, the drafter learns its distributions.

    python -m mlx_distill.train_drafter --model M --data prompts.jsonl --output DIR
    python -m mlx_distill.train_drafter --model M --answers answers.npz --output DIR
    python -m mlx_distill.train_drafter --model M --output DIR

Without data a chat model writes its user's turns itself. ``--drafter-kind medusa`` trains heads in
place of a recurrent drafter.

First the model answers the prompts (many at once; the answers are kept beside the output and used
again), then the drafter is trained on them. A run that was stopped goes on with ``--resume``.
``--write-answers answers.npz`` in place of an output writes the answers, and ends.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlx import nn

from mlx_distill import cli
from mlx_distill.config import add_flags, from_flags
from mlx_distill.data.prompts import read_prompts
from mlx_distill.data.report import Report
from mlx_distill.data.sources import check_sources
from mlx_distill.distillation.answer_files import WrittenAnswers, read_answers
from mlx_distill.distillation.answer_writing import write_answers
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_training import train_drafter
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.drafters.networks import Network
from mlx_distill.drafters.registry import TrainedDrafter, load_drafter
from mlx_distill.errors import InputError
from mlx_distill.files import output_path
from mlx_distill.limits import Count, check_value
from mlx_distill.target.target import Target
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.runs import check_output

T = TypeVar("T")


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter as the arguments say; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(
        DrafterTraining,
        arguments,
        responses=from_flags(ResponseConfig, arguments),
        training=from_flags(TrainingConfig, arguments),
    )
    for name in ("max_prompts", "prompt_tokens"):
        check_value(name, getattr(arguments, name), Count | None)
    _check_names(arguments)
    about = _about(arguments)
    given = read_answers(arguments.answers) if arguments.answers else None
    model, tokenizer = cli.load_model(arguments)
    report = Report(noun="answers" if given else "prompts")
    if arguments.write_answers:
        prompts, path = _prompts(arguments, tokenizer, report), arguments.write_answers
        quiet = arguments.quiet
        write_answers(model, tokenizer, prompts, path, config.responses, report=report, quiet=quiet)
        print(f"the answers are in {path}")
        return 0
    train_drafter(
        model,
        tokenizer,
        _learned(arguments, given, model, tokenizer, report),
        arguments.output,
        config,
        start=_start(arguments.start_from, model, tokenizer),
        responses=arguments.responses,
        features=arguments.features,
        resume=arguments.resume,
        about=about,
        report=report,
        template_config=cli.template_config(arguments),
        quiet=arguments.quiet,
    )
    print(f"the drafter is in {arguments.output}")
    return 0


def _check_names(arguments: argparse.Namespace) -> None:
    """Raise InputError if what is read or written cannot be, before anything is loaded."""
    if bool(arguments.output) == bool(arguments.write_answers):
        raise InputError("name either --output, the drafter's folder, or --write-answers")
    if arguments.output:
        check_output(output_path(arguments.output), arguments.resume)
    else:
        cli.new_file(arguments.write_answers)
    if arguments.data and arguments.answers:
        raise InputError("name either --data, prompts that the model answers, or --answers")
    if arguments.write_answers and not arguments.data:
        raise InputError("--write-answers needs --data, prompts that the model answers")
    _check_reading(arguments)
    check_sources(arguments.data)


def _check_reading(arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag says how something is read that nobody reads."""
    data, answers = bool(arguments.data), bool(arguments.answers)
    without_template = arguments.ignore_chat_template and answers  # else it is said what is missing
    for flag, given, read in (
        ("--max-prompts", arguments.max_prompts, data or answers),
        ("--prompt-tokens", arguments.prompt_tokens, data),
        ("--ignore-chat-template", without_template, data),
        ("--chat-template-config", cli.template_config(arguments), not answers),
    ):
        if given and not read:
            kind = "answers are token ids already" if answers else "without --data there are none"
            raise InputError(f"{flag} says how prompts are read; {kind}")


def _learned(
    arguments: argparse.Namespace,
    given: WrittenAnswers | None,
    model: nn.Module,
    tokenizer: Any,
    report: Report,
) -> list[list[int]] | WrittenAnswers | None:
    """Return what the drafter learns from; None if the model has to write the prompts, too."""
    if given:
        return _answers(given, arguments.max_prompts, model, report)
    if arguments.data:
        return _prompts(arguments, tokenizer, report)
    if arguments.ignore_chat_template:
        raise InputError("without its chat template a model writes no prompts; name some: --data")
    return None


def _start(name: str | None, model: nn.Module, tokenizer: Any) -> Network | None:
    """Return the drafter to start from."""
    if not name:
        return None
    first = load_drafter(name, model, tokenizer)
    if not isinstance(first, TrainedDrafter):
        raise InputError(f"{name} has no weights; it cannot be trained")
    return first.network


def _answers(
    given: WrittenAnswers, most: int | None, model: nn.Module, report: Report
) -> WrittenAnswers:
    """Return the answers, or the first of them; the report counts the rows."""
    given.check(Target.of(model).vocab_size)
    report.rows = len(given.responses)
    return given.only(_first(range(report.rows), most, report, "answer"))


def _prompts(arguments: argparse.Namespace, tokenizer: Any, report: Report) -> list[list[int]]:
    """Return the prompts of all files, or the first of them; the report counts the rows."""
    prompts = [
        prompt
        for path in arguments.data
        for prompt in read_prompts(
            path,
            tokenizer,
            prompt_tokens=arguments.prompt_tokens,
            chat_template=not arguments.ignore_chat_template,
            template_config=cli.template_config(arguments),
            report=report,
        )
    ]
    return [*_first(prompts, arguments.max_prompts, report, "prompt")]


def _first(rows: Sequence[T], most: int | None, report: Report, noun: str) -> Sequence[T]:
    """Return the first of the rows, or all; the others are counted as dropped."""
    kept = rows[:most]
    for number in range(len(kept), len(rows)):
        report.drop(f"behind the first {len(kept)}", f"{noun} {number + 1}")
    report.kept = len(kept)
    return kept


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what settings and card say about the data and the model; of folders the names."""
    return {
        "data": [Path(path).name for path in [*arguments.data, arguments.answers] if path],
        "max_prompts": arguments.max_prompts,
        "prompt_tokens": arguments.prompt_tokens,
        "start_from": arguments.start_from and Path(arguments.start_from).name,
        "adapter_path": arguments.adapter_path and Path(arguments.adapter_path).name,
        "chat_template_config": cli.template_config(arguments),
        "ignore_chat_template": arguments.ignore_chat_template,
    }


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.train_drafter",
        description="Train a recurrent drafter or Medusa heads for a model by distillation.",
    )
    cli.add_model_flags(parser)
    _add_source_flags(parser)
    _add_run_flags(parser)
    for config in (DrafterTraining, ResponseConfig, TrainingConfig):
        add_flags(parser, config)
    return parser


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is learned from."""
    parser.add_argument(
        "--data",
        type=cli.path,
        default=[],
        nargs="+",
        help="JSONL files of prompts, messages, turns or text, which the model answers",
    )
    parser.add_argument(
        "--answers",
        type=cli.path,
        metavar="NPZ",
        help="answers that this very model has written already, as token ids: arrays prompt, "
        "answer, prompt_len, answer_len and greedy",
    )
    parser.add_argument(
        "--start-from",
        type=cli.path,
        metavar="DRAFTER",
        help="start with the weights of this drafter's folder (default: random ones)",
    )
    parser.add_argument(
        "--max-prompts",
        type=int,
        metavar="INT",
        help="use the first so many prompts, or answers, only; at least 1 (default: all)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="INT",
        help="the longest prompt, in tokens; at least 1. Bare prompts are cut, longer chats are "
        "left out and counted (default: rows of text are cut to 32, others are not)",
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use prompts as they are"
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of where it goes, and what is kept on the way."""
    parser.add_argument("--output", type=cli.path, help="the drafter's folder; must not exist")
    parser.add_argument(
        "--write-answers",
        type=cli.path,
        metavar="NPZ",
        help="only write the model's answers to --data, into a file for --answers that must not "
        "exist; what was stopped goes on when the same is asked again",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished training of this output"
    )
    parser.add_argument(
        "--responses",
        type=cli.path,
        help="where the model's answers are kept (default: OUTPUT.responses.jsonl)",
    )
    parser.add_argument(
        "--features",
        type=cli.path,
        metavar="DIR",
        help="keep what the model computes of the answers in this folder, for every epoch and for "
        "other trainings on the same answers (default: what does not fit in --feature-gb of "
        "memory is computed in every epoch)",
    )
    parser.add_argument("--quiet", action="store_true", help="draw no progress bar")


cli.callable_as(__name__, train_drafter)

if __name__ == "__main__":
    sys.exit(main())
