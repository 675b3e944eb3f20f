"""Write a drafter with 4, 5, 6 or 8 bits a weight, and say what that costs.

    python -m mlx_distill.convert --model M --drafter D --output DIR --bits 4 \
        --answers answers.npz

The answers are the model's own; those that it wrote at temperature 0 count.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from mlx_distill import cli, machine
from mlx_distill.calibration.measuring import Pair
from mlx_distill.distillation.answer_files import read_answers
from mlx_distill.drafters.packing import BITS
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.evaluation.quantised import quantize_and_judge
from mlx_distill.limits import Count, check_value


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Quantise a drafter as the arguments say; return the exit status."""
    arguments = _parser().parse_args(argv)
    check_value("max_texts", arguments.max_texts, Count)
    answers = read_answers(arguments.answers).greedy_ones()
    answers = answers.only(range(len(answers.responses))[: arguments.max_texts])
    model, tokenizer = cli.load_model(arguments)
    pair = Pair(model, tokenizer, load_drafter(arguments.drafter, model, tokenizer))
    answers.check(pair.target.vocab_size)
    found = quantize_and_judge(pair, arguments.drafter, arguments.output, arguments.bits, answers)
    for one in found:
        print(one.line())
    print(f"the drafter is in {arguments.output}")
    if arguments.json:
        known = {"config": cli.settings(arguments), **machine.provenance()}
        print(json.dumps({"drafters": [asdict(one) for one in found], **known}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.convert",
        description="Quantise a drafter's weights, and judge it before and after.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("--drafter", type=cli.path, required=True, help="the drafter's folder")
    parser.add_argument(
        "--output", type=cli.path, required=True, help="the new folder; must not exist"
    )
    parser.add_argument(
        "--bits", type=int, choices=BITS, default=6, help="of a weight (default: 6)"
    )
    parser.add_argument(
        "--answers",
        type=cli.path,
        metavar="NPZ",
        required=True,
        help="answers that this very model has written already, as train_drafter takes them",
    )
    parser.add_argument(
        "--max-texts",
        type=int,
        default=32,
        metavar="INT",
        help="judge by the first so many answers; at least 1 (default: 32)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as a last line of JSON"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
