"""Measure how well a teacher and its students predict, answer and run, with intervals.

    python -m mlx_distill.evaluate --teacher DIR --student plain=DIR distilled=DIR --data x.jsonl
    python -m mlx_distill.evaluate --teacher DIR --drafter DIR --data answers.npz

All models read the same batches, and the teacher's logits serve all students. Intervals are of
95 %, over texts drawn anew, for the tokens of a text hang together. Without a teacher every model
is measured by itself, with its own tokenizer.

A drafter is judged by answers of its target, the teacher here: those that were written already, or
new ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields

from mlx_distill import cli, machine
from mlx_distill.calibration.pair import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.config import add_flags, from_flags
from mlx_distill.data.completions import CompletionFilter
from mlx_distill.data.corpus import LAYOUTS, Reading
from mlx_distill.data.sources import check_sources
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.draft_table import show_drafter
from mlx_distill.evaluation.evaluation import EvaluationConfig, measure
from mlx_distill.evaluation.judging import JudgingConfig, Material, check_material, judge_drafter
from mlx_distill.evaluation.models import TEACHER, Sources
from mlx_distill.evaluation.questions import QuestionConfig, read_questions
from mlx_distill.evaluation.table import plain, show
from mlx_distill.files import write_new


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(EvaluationConfig, arguments)
    asking = from_flags(QuestionConfig, arguments)
    keep = from_flags(CompletionFilter, arguments)
    reading = Reading(arguments.data_layout, keep, template_config=cli.template_config(arguments))
    _refuse_unused(argv, arguments)
    if arguments.drafter:
        return _judge_drafter(arguments)
    sources = Sources.named(arguments.teacher, arguments.student, arguments.adapter_path)
    output = cli.new_file(arguments.output)
    check_sources([arguments.data], "valid")  # before anything is loaded
    questions = read_questions(arguments.qa)[: config.max_texts] if arguments.qa else []
    loaded = sources.load(cli.code_options(arguments.trust_remote_code))
    figures = measure(loaded, arguments.data, config, sources.teacher, questions, asking, reading)
    result = {"models": figures, "config": cli.settings(arguments), **machine.provenance()}
    if output:  # first, for nobody may be reading what is shown
        write_new(output, json.dumps(plain(result), indent=1) + "\n")
    show(result)
    if arguments.json:
        print(json.dumps(plain(result)))
    return 0


def _refuse_unused(argv: Sequence[str] | None, arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag was given that nothing would look at."""
    texts = [field.name for field in fields(EvaluationConfig) if field.name != "max_texts"]
    cli.refuse_unused(
        _parser(),
        argv,
        (
            arguments.drafter is not None,
            [*texts, "data_layout", QuestionConfig, CompletionFilter],
            "--drafter is judged by its target's answers",
        ),
        (arguments.drafter is None, [JudgingConfig], "this says how a --drafter is judged"),
        (arguments.qa is None, [QuestionConfig], "nothing is asked without --qa"),
        (
            arguments.data_layout == "texts",
            [CompletionFilter],
            "only --data-layout completions is filtered",
        ),
    )


def _judge_drafter(arguments: argparse.Namespace) -> int:
    """Judge a drafter as the arguments say; return the exit status."""
    config = from_flags(JudgingConfig, arguments)
    if arguments.student or arguments.qa:
        raise InputError("a drafter is judged with its target, --teacher, and nothing else")
    output = cli.new_file(arguments.output)
    options = {"template_config": cli.template_config(arguments)}
    check_material(arguments.data, **options)  # before anything is loaded
    name = arguments.teacher or str(bundled("stories-14m"))
    sources = Sources.named(name, [], arguments.adapter_path)
    loaded = sources.load(cli.code_options(arguments.trust_remote_code))[TEACHER]
    drafter = load_drafter(arguments.drafter, loaded.model, loaded.tokenizer)
    pair = Pair(loaded.model, loaded.tokenizer, drafter)
    material = Material.read(arguments.data, pair, arguments.max_texts, **options)
    found = judge_drafter(pair, material, config, quiet=False)
    result = {**found, "config": cli.settings(arguments), **machine.provenance()}
    if output:
        write_new(output, json.dumps(result, indent=1) + "\n")
    show_drafter(found)
    if arguments.json:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.evaluate",
        description="Measure how well a teacher and its students predict, answer and run.",
    )
    _add_source_flags(parser)
    _add_drafter_flags(parser)
    add_flags(parser, EvaluationConfig)
    add_flags(parser, QuestionConfig)
    add_flags(parser, CompletionFilter)
    cli.add_reading_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print everything as a last line of JSON"
    )
    parser.add_argument(
        "--output", type=cli.path, help="write everything to this JSON file; it must not exist"
    )
    return parser


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name models, texts and questions."""
    parser.add_argument(
        "--teacher",
        type=cli.path,
        metavar="DIR",
        help="the folder or hub repository of the model that the students are compared with "
        "(default: none; every model is measured by itself)",
    )
    parser.add_argument(
        "--student",
        type=cli.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="names and folders or hub repositories of models; the first is the one whose gap to "
        "the teacher the others close",
    )
    parser.add_argument(
        "--adapter-path",
        type=cli.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="folders of adapters that mlx-lm trained for some of the models; the teacher's name "
        "is teacher (default: none)",
    )
    parser.add_argument(
        "--data",
        type=cli.path,
        required=True,
        help="JSONL of held-out texts, or a folder with valid.jsonl; with --drafter, see there",
    )
    parser.add_argument(
        "--data-layout",
        choices=LAYOUTS,
        default="texts",
        help="texts for mlx-lm's layouts, completions for stored answers (default: texts)",
    )
    parser.add_argument(
        "--qa",
        type=cli.path,
        metavar="JSONL",
        help="questions, their contexts and answers (default: none)",
    )


def _add_drafter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that have a drafter judged instead."""
    parser.add_argument(
        "--drafter",
        type=cli.path,
        metavar="DIR",
        help="judge this drafter of the teacher's, which is the bundled model if none is named; "
        "--data is then prompts, or an npz file of answers that the teacher has written, of which "
        "the greedy ones count (default: none)",
    )
    add_flags(parser, JudgingConfig)


if __name__ == "__main__":
    sys.exit(main())
