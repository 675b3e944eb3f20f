"""Write a drafter in a smaller form and say what that costs, or in the published layout.

    python -m mlx_distill.convert --model M --drafter D --output DIR --head-rank 192 --bits 5 \
        --answers answers.npz
    python -m mlx_distill.convert --model M --drafter PUBLISHED --output DIR --to ours
    python -m mlx_distill.convert --model M --drafter D --output DIR --to published

The answers are the model's own; those that it wrote at temperature 0 count.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from mlx_distill import cli, machine
from mlx_distill.calibration.pair import Pair
from mlx_distill.distillation.answer_files import read_answers
from mlx_distill.distillation.answer_writing import origin
from mlx_distill.drafters.imports import export_published, holds_heads, import_published
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.packing import BITS
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.published import tensorrt_plan
from mlx_distill.drafters.registry import TrainedDrafter, load_drafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.converted import Form, convert_and_judge
from mlx_distill.files import new_path
from mlx_distill.limits import Count, check_value
from mlx_distill.target.context import position_limit
from mlx_distill.target.target import Target

FORMS = ("smaller", "ours", "published")


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert a drafter as the arguments say; return the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.to != FORMS[0]:
        unused = ["answers", "max_texts"]
        cli.refuse_unused(_parser(), argv, (True, unused, f"--to {arguments.to} judges nothing"))
        return _other_layout(arguments)
    if arguments.answers is None:
        raise InputError("to judge a smaller drafter, name answers of the model: --answers")
    check_value("max_texts", arguments.max_texts, Count)
    output = new_path(arguments.output)  # before anything is loaded
    answers = read_answers(arguments.answers).greedy_ones()
    model, tokenizer = cli.load_model(arguments)
    pair = Pair(model, tokenizer, load_drafter(arguments.drafter, model, tokenizer))
    answers.check(pair.target.vocab_size, origin(model, tokenizer))
    answers = answers.readable(position_limit(model))
    numbers = range(len(answers.responses))
    judged = answers.only(numbers[: arguments.max_texts])
    others = answers.only(numbers[arguments.max_texts :])
    form = Form(arguments.bits, arguments.head_rank)
    fitted = (others if others.responses else judged).responses
    found = convert_and_judge(pair, arguments.drafter, output, form, judged, fitted)
    for one in found:
        print(one.line())
    print(f"the drafter is in {arguments.output}")
    if arguments.json:
        known = {"config": cli.settings(arguments), **machine.provenance()}
        print(json.dumps({"drafters": [asdict(one) for one in found], **known}))
    return 0


def _other_layout(arguments: argparse.Namespace) -> int:
    """Import or export a drafter; return the exit status."""
    if arguments.bits or arguments.head_rank:
        raise InputError(f"--to {arguments.to} writes weights as they are; convert them before")
    output = new_path(arguments.output)
    model, tokenizer = cli.load_model(arguments)
    if arguments.to == "ours":
        heads, plan = holds_heads(arguments.drafter), tensorrt_plan(arguments.drafter)
        import_published(arguments.drafter, output, Target.of(model), tokenizer)
    else:
        drafter, plan = load_drafter(arguments.drafter, model, tokenizer), None
        if not isinstance(drafter, TrainedDrafter):
            raise InputError(f"{arguments.drafter} has no weights that could be exported")
        heads = isinstance(drafter, MedusaDrafter)
        export_published(drafter, output)
    print(f"the drafter is in {arguments.output}")
    if not heads:
        print(_lengths(plan))
    if arguments.json:
        print(json.dumps({"config": cli.settings(arguments), **machine.provenance()}))
    return 0


def _lengths(asked: DraftPlan | None) -> str:
    """Return what beams of a shape are called here and elsewhere; the default's if none is."""
    plan = asked or DraftPlan()
    width, length = plan.beam_width, plan.draft_length
    return (
        f"{'its beams' if asked else 'for example, beams'} of {width} x {length} drafted tokens "
        f"are --beam-width {width} --draft-length {length} here, a beam length of {length + 1} in "
        f"the published code, which counts the certain token, and redrafter_num_beams {width}, "
        f"redrafter_draft_len_per_beam {length} in TensorRT-LLM"
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.convert",
        description="Write a drafter in a smaller form and judge it before and after, or write it "
        "in another layout.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("--drafter", type=cli.path, required=True, help="the drafter's folder")
    parser.add_argument(
        "--output", type=cli.path, required=True, help="the new folder; must not exist"
    )
    parser.add_argument(
        "--to",
        choices=FORMS,
        default=FORMS[0],
        help="smaller has fewer bits or a narrower head; ours reads the layout published with the "
        "papers of recurrent drafters and of Medusa heads, safetensors of PyTorch or MLX, and "
        "published writes it (default: %(default)s)",
    )
    parser.add_argument(
        "--bits", type=int, choices=BITS, help="of a weight (default: weights stay as they are)"
    )
    parser.add_argument(
        "--head-rank",
        type=int,
        metavar="INT",
        help="make the head of two matrices, with so many numbers between them; on a small model "
        "the head is most of a draft (default: it stays one)",
    )
    parser.add_argument(
        "--answers",
        type=cli.path,
        metavar="NPZ",
        help="answers that this very model has written already, as train_drafter takes them; "
        "smaller needs them",
    )
    parser.add_argument(
        "--max-texts",
        type=int,
        default=32,
        metavar="INT",
        help="judge by the first so many answers; at least 1. A narrower head is fitted on those "
        "behind them, or on the same where there are no more (default: 32)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as a last line of JSON"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
