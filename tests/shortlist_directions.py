"""The directions of a trained drafter's shortlist, and what a shortlist loses with and without.

    python tests/shortlist_directions.py --model M --drafter D --answers answers.npz --output DIR

A training writes them beside the drafter; this does so for one that was trained before. They are
those of some answers, and judged on others. Not collected by pytest: it takes a minute.
"""

import argparse
import json
from pathlib import Path

import mlx_distill  # the BLAS comes first
from mlx_distill.distillation.answer_files import read_answers
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_trainer import DrafterTrainer
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.shortlist import FILE, Directions, Shortlist
from mlx_distill.target.target import Target

import mlx.core as mx  # isort: skip

LIKELIEST = 4


def lost(drafter: BoundDrafter, directions: Directions | None, inputs: mx.array) -> float:
    """Return the share of the likeliest tokens' probability that a shortlist leaves out."""
    weight, sharpness = drafter.network.head.weight, drafter.config.sharpness
    probs = mx.softmax(sharpness * (inputs @ weight.T), axis=-1)
    columns = mx.argsort(-probs, axis=-1)[:, :LIKELIEST]
    likely = mx.take_along_axis(probs, columns, axis=-1)
    listed = Shortlist(weight, directions)(inputs, None, sharpness, None).tokens
    there = (columns[:, :, None] == listed[:, None]).any(axis=-1)
    return float(1 - (likely * there).sum() / likely.sum())


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--num", type=int, default=96, help="answers to learn from")
    parser.add_argument("--judged", type=int, default=32, help="others, to judge on")
    parser.add_argument("--output", type=Path, help="a folder for the file; default: none")
    args = parser.parse_args()
    model, tokenizer = mlx_distill.load(args.model)
    drafter = mlx_distill.load_drafter(args.drafter, model, tokenizer)
    assert isinstance(drafter, BoundDrafter)
    shape, responses = drafter.config, read_answers(args.answers).responses
    trainers = []
    for first, count in ((0, args.num), (args.num, args.judged)):
        config = DrafterTraining(
            tap_layers=shape.taps,
            context_blocks=shape.context_blocks,
            context_window=shape.context_window,
            draft_vocab_size=shape.draft_vocab_size,
            held_out=count,
        )
        some = responses[first : first + count + 2]
        trainers.append(DrafterTrainer(Target.of(model), some, config, start=drafter.network))
    learned, judged = trainers
    directions, inputs = learned.directions(), judged.head_inputs()
    assert directions is not None
    assert inputs is not None
    halves = Directions(*(x.astype(mx.bfloat16) for x in directions))
    found = {"answers": args.num, "judged": args.judged, "inputs": inputs.shape[0]}
    found["lost_without"] = lost(drafter, None, inputs)
    found["lost"] = lost(drafter, Directions(*(x.astype(mx.float32) for x in halves)), inputs)
    print(json.dumps(found))
    if args.output:
        mx.save_safetensors(str(args.output / FILE), halves._asdict(), {"format": "mlx"})


if __name__ == "__main__":
    main()
