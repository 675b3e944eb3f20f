"""Learn from a teacher of whom there is nothing but stored text.

    python examples/stored_completions.py --data stories/

For lack of somebody else's log this writes one: the bundled stories-14m answers the beginnings of
some stories, and its answers are stored as a chat service stores them, with two that are no use
(doubled, refused). Stories that were cut off are kept: they are learned without an end. A student
then learns from that file alone: filtered, trained on hard labels, compared with the student it was
before. No teacher is loaded for it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import InputError, cli, machine
from mlx_distill.checkpoint import bundled
from mlx_distill.data.completions import CompletionFilter, completion_texts, read_completions
from mlx_distill.data.encoding import read_texts
from mlx_distill.data.prompts import read_prompts
from mlx_distill.data.selection import fit
from mlx_distill.distillation.responses import ResponseConfig, answer
from mlx_distill.distillation.students import from_layers, read_config
from mlx_distill.evaluation.metrics import report
from mlx_distill.evaluation.texts import evaluate
from mlx_distill.files import write_whole
from mlx_distill.limits import Count, check_value


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Store, filter, train and compare; return the exit status."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    path = bundled("stories-14m")
    teacher, tokenizer = mlx_distill.load(path)
    if not arguments.log.exists():
        store(arguments, teacher, tokenizer)
    keep = CompletionFilter(min_answer_chars=20, drop_truncated=False, where="temperature <= 1")
    completions, found = read_completions(arguments.log, keep)
    print("\n".join(found.lines()))
    student, _ = from_layers(teacher, read_config(path), [0])
    before, _ = from_layers(teacher, read_config(path), [0])
    texts, _ = fit(completion_texts(completions, tokenizer), 160)
    valid = read_texts(arguments.data / "valid.jsonl", tokenizer)[: arguments.valid_texts]
    valid, _ = fit(valid, 256)
    done = mlx_distill.distill(
        student,
        None,
        texts,
        folder=arguments.work,
        losses=["hard"],
        training=mlx_distill.TrainingConfig(steps=arguments.steps, checkpoint_every=50),
        trained="chosen layers",
    )
    if not done.finished:
        raise KeyboardInterrupt
    figures = report(evaluate({"before": before, "after": student}, valid))
    for name, figure in figures.items():
        value, interval = figure["perplexity"]["value"], figure["perplexity"]["interval"]
        # Of one text there is no interval.
        between = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
        print(f"{name:7} perplexity {value:8.2f}{between}, {len(valid)} texts held out")
    if arguments.json:
        run = {"figures": figures, "texts": len(texts), **machine.provenance()}
        arguments.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError if an argument cannot be used; before anything is written."""
    for name in ("texts", "steps", "valid_texts"):
        check_value(name, getattr(arguments, name), Count)
    if not arguments.log.exists() and not any(arguments.data.glob("train*.jsonl")):
        raise InputError(f"{arguments.data} holds no train*.jsonl")
    for file in (arguments.log, arguments.json):
        if file and not file.parent.is_dir():
            raise InputError(f"{file} cannot be written: its folder does not exist")


def store(arguments: argparse.Namespace, teacher: Any, tokenizer: Any) -> None:
    """Write a log of chat completions, two of which are no use."""
    data = next(iter(sorted(arguments.data.glob("train*.jsonl"))))
    prompts = read_prompts(data, tokenizer, prompt_tokens=12)[: arguments.texts]
    config = ResponseConfig(max_tokens=120, temperatures=(1.0,), response_batch_size=64)
    rows = []
    for start in range(0, len(prompts), 64):
        some = prompts[start : start + 64]
        for prompt, tokens in zip(
            some, answer(teacher, tokenizer.eos_token_ids, some, start, config), strict=True
        ):
            ended = tokens[-1] in tokenizer.eos_token_ids
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append(_row(tokenizer.decode(prompt, skip_special_tokens=True), text, ended))
    question = rows[0]["request"]["messages"][0]["content"]
    rows += [rows[0], _row(question, "I'm sorry, but I can't help with that.", True)]
    write_whole(arguments.log, "".join(json.dumps(row) + "\n" for row in rows))


def _row(question: str, text: str, ended: bool) -> dict[str, Any]:
    """Return a stored chat completion."""
    return {
        "request": {"messages": [{"role": "user", "content": question}]},
        "response": {
            "model": "stories-14m",
            "choices": [
                {
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if ended else "length",
                }
            ],
        },
        "metadata": {"temperature": 1.0},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of train*.jsonl, valid.jsonl"
    )
    parser.add_argument(
        "--log", type=Path, default=Path("completions.jsonl"), help="stored answers"
    )
    parser.add_argument("--work", type=Path, default=Path("completions-run"), help="checkpoints")
    parser.add_argument("--texts", type=int, default=384, help="answers to store")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--valid-texts", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
