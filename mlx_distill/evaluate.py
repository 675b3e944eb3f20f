"""Measure how well a teacher and its students predict, answer and run, with intervals.

    python -m mlx_distill.evaluate --teacher DIR --student plain=DIR distilled=DIR --data x.jsonl

All models read the same batches, and the teacher's logits of a batch serve all students. Intervals
are of 95 %, over texts drawn anew, for the tokens of a text hang together. Without a teacher every
model is measured by itself, with its own tokenizer.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx import nn
from mlx_lm.utils import hf_repo_to_path
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mlx_distill import cli, machine
from mlx_distill.arrays import num_bytes, num_parameters
from mlx_distill.checkpoint import load, tokenizer_hash
from mlx_distill.config import add_flags, check_seed, from_flags
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.data.texts import Text, fit, local_file, read_texts, text_batch
from mlx_distill.errors import InputError
from mlx_distill.evaluation.metrics import (
    Sums,
    exact_match,
    f1,
    report,
    resampled,
    text_sums,
    token_scores,
    with_interval,
)
from mlx_distill.files import read_jsonl
from mlx_distill.speculation.generation import generate
from mlx_distill.target.target import context_length

TEACHER = "teacher"
ANSWER_TOKENS = 32
SPEED_PROMPT, SPEED_RUNS = 32, 3
FIGURES = {
    "perplexity": ("perplexity", ".3f"),
    "nats_per_token": ("nats/token", ".3f"),
    "kl": ("KL, nats/token", ".4f"),
    "agreement": ("agreement", ".1%"),
    "gap_closed": ("gap closed", ".1%"),
    "calibration_error": ("calib. error", ".2%"),
    "exact_match": ("exact match", ".1%"),
    "f1": ("F1", ".1%"),
}


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured.

    Args:
        max_texts: Use the first so many texts, and questions.
        max_length: Cut texts to so many tokens.
        batch_size: Texts read at once.
        bootstrap: How often the texts are drawn anew for the intervals; 0 leaves them out.
        seed: Of those draws.
        speed_tokens: Tokens decoded to measure speed; 0 leaves it out.
    """

    max_texts: int | None = None
    max_length: int = 512
    batch_size: int = 8
    bootstrap: int = 1000
    seed: int = 0
    speed_tokens: int = 128

    def __post_init__(self) -> None:
        lowest = {"max_texts": 1, "max_length": 2, "batch_size": 1, "bootstrap": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} must be at least {low}, got {value}")
        check_seed("seed", self.seed)
        if self.speed_tokens < 0 or self.speed_tokens == 1:
            raise InputError(
                f"speed_tokens must be at least 2, to time, or 0, got {self.speed_tokens}"
            )


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the folder or hub repository that they come from."""

    model: nn.Module
    tokenizer: Any
    source: str


@dataclass(frozen=True)
class Question:
    """What is asked, behind its context if there is one, and the answers that count as right."""

    text: str
    references: list[str]


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(EvaluationConfig, arguments)
    sources = _sources(arguments.teacher, arguments.student)
    _check_output(arguments.output)
    local_file(arguments.data, "valid")  # before anything is loaded
    questions = read_questions(arguments.qa)[: config.max_texts] if arguments.qa else []
    options = cli.code_options(arguments.trust_remote_code)
    loaded = {name: Loaded(*load(path, **options), path) for name, path in sources.items()}
    teacher = None if arguments.teacher is None else TEACHER
    groups = [loaded] if teacher else [{name: one} for name, one in loaded.items()]
    rows: dict[str, dict[str, Any]] = {}
    prompts: dict[str, list[int]] = {}
    for group in groups:
        texts = _read(arguments.data, group, config)
        models = {name: one.model for name, one in group.items()}
        sums = evaluate(models, texts, teacher, config.batch_size)
        rows |= report(sums, teacher, config.bootstrap, config.seed)
        prompts |= dict.fromkeys(group, texts[0].tokens[:SPEED_PROMPT])
    if config.speed_tokens:
        for name, speed in decoding_speeds(loaded, prompts, config.speed_tokens).items():
            rows[name]["tokens_per_s"] = speed
    for name, one in loaded.items():
        rows[name] |= _answers(name, one, questions, config) | _sizes(one)
    result = {
        "models": rows,
        "config": cli.settings(arguments),
        **machine.provenance(),
    }
    show(result)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(_plain(result), indent=1) + "\n")
    if arguments.json:
        print(json.dumps(_plain(result)))
    return 0


def evaluate(
    models: dict[str, nn.Module],
    texts: Sequence[Text],
    teacher: str | None = None,
    batch_size: int = 8,
) -> dict[str, Sums]:
    """Return every model's sums per text, for ``report``: arrays whose first axis is the texts.

    They are ``tokens``, ``nats``, ``bin_confidence`` and ``bin_right`` (see ``text_sums``), and for
    models other than the teacher ``kl`` and ``agree`` with it. Vocabularies of different widths are
    cut to the narrowest before the softmax.

    Args:
        models: By name.
        texts: Those of ``fit``, which have something to predict.
        teacher: Which of the models the others are compared with.
        batch_size: Texts read at once.

    Raises:
        InputError: If a text has tokens that a model does not know, or logits are not numbers.
    """
    if teacher is not None and teacher not in models:
        raise InputError(f"teacher must be one of {', '.join(models)}, got {teacher}")
    width = min(vocabulary_widths(models).values())
    largest = max(max(text.tokens) for text in texts)
    if largest >= width:
        raise InputError(f"the texts hold token {largest}, a model's vocabulary ends at {width}")
    names = sorted(models, key=lambda name: name != teacher)  # the teacher comes first
    found: dict[str, list[Sums]] = {name: [{}] * len(texts) for name in names}
    # Texts of similar length come together, so little is padded, and nothing beyond the longest:
    # that could be beyond a model's last position.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row].tokens))
    starts = range(0, len(texts), batch_size)
    for start in tqdm(starts, desc="evaluate", unit="batch", leave=False):
        batch = text_batch(texts, order[start : start + batch_size], multiple=1)
        learned = np.array(batch.mask) > 0
        teacher_logits = None
        for name in names:
            logits = models[name](batch.inputs)[..., :width]
            for place, row in enumerate(batch.rows):  # one by one, to hold fewer vocabularies
                known = None if teacher_logits is None else teacher_logits[place]
                scores = token_scores(logits[place], batch.labels[place], known)
                mx.eval(scores)
                kept = {key: np.array(value)[learned[place]] for key, value in scores.items()}
                if np.isnan(kept["nats"]).any():
                    raise InputError(
                        f"the logits of {name} are not numbers; its weights are damaged, or its "
                        "precision is too low"
                    )
                found[name][row] = text_sums(kept)
            if name == teacher:
                teacher_logits = logits
    return {
        name: {key: np.stack([sums[key] for sums in found[name]]) for key in found[name][0]}
        for name in models
    }


def vocabulary_widths(models: dict[str, nn.Module]) -> dict[str, int]:
    """Return how many logits each model gives."""
    return {name: model(mx.array([[0]])).shape[-1] for name, model in models.items()}


def read_questions(path: str | Path) -> list[Question]:
    """Return the questions of a JSONL file.

    A row holds ``question``, maybe ``context``, and references: a list ``answers``, or texts
    ``answer``, ``answer1``, ``answer2`` and so on. All of them count.

    Raises:
        InputError: If the file cannot be read, a row cannot be used, or there are no rows.
    """
    questions = []
    for place, row in read_jsonl(path):
        answers = row.get("answers", [])
        references = [*answers] if isinstance(answers, list) else [answers]
        references += [row[key] for key in row if re.fullmatch(r"answer\d*", key)]
        for text in (row.get("question"), row.get("context") or "none", *references):
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"{place}: question, context and answers must be texts, got {text!r:.40}"
                )
        if not references:
            raise InputError(f"{place}: expected answers or answer, got {sorted(row)}")
        context = [row["context"]] if row.get("context") else []
        questions.append(Question("\n".join([*context, row["question"]]), references))
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def answer_scores(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], title: str = "questions"
) -> Sums:
    """Return exact match and F1 of a model's greedy answers, one value per question."""
    has_template = getattr(tokenizer, "has_chat_template", False)
    scores: dict[str, list[float]] = {"exact_match": [], "f1": []}
    for question in tqdm(questions, desc=title, unit="question", leave=False):
        text = question.text if has_template else question.text + "\n"
        prompt = encode_prompt(tokenizer, text)
        answer = generate(model, tokenizer, prompt, max_tokens=ANSWER_TOKENS, stop=("\n",))
        scores["exact_match"].append(exact_match(answer, question.references))
        scores["f1"].append(f1(answer, question.references))
    return {name: np.array(values) for name, values in scores.items()}


def decoding_speeds(
    loaded: dict[str, Loaded], prompts: dict[str, list[int]], num_tokens: int
) -> dict[str, float]:
    """Return how many tokens per second mlx-lm decodes greedily, the median of three runs.

    Models take turns, so that a machine whose speed drifts does not decide.
    """
    for name, one in loaded.items():
        context = context_length(one.model)
        if context is not None and len(prompts[name]) + num_tokens > context:
            raise InputError(
                f"speed_tokens {num_tokens} after a prompt of {len(prompts[name])} are beyond "
                f"the context of {name}, {context}"
            )
        _decoding_speed(one, prompts[name], min(num_tokens, 16))
    runs: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(SPEED_RUNS):
        for name, one in loaded.items():
            runs[name].append(_decoding_speed(one, prompts[name], num_tokens))
    return {name: statistics.median(values) for name, values in runs.items()}


def show(result: dict[str, Any]) -> None:
    """Print an evaluation: a column per model, a row per figure that any model has."""
    # As wide as the table needs: a figure with its interval is not to be broken.
    console = Console(highlight=False, soft_wrap=True, width=1000)
    rows = result["models"]
    found = result["machine"]
    title = f"{found['processor']}, {found['device']}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for key, (label, form) in FIGURES.items():
        if any(key in row for row in rows.values()):
            table.add_row(label, *(_cell(row.get(key), form) for row in rows.values()))
    if any("tokens_per_s" in row for row in rows.values()):
        table.add_row("tokens/s", *(f"{row['tokens_per_s']:.0f}" for row in rows.values()))
    table.add_row("parameters", *(f"{row['parameters'] / 1e6:.1f} M" for row in rows.values()))
    for key, label in (("weights_bytes", "loaded"), ("file_bytes", "on disk")):
        table.add_row(label, *(f"{row[key] / 1e6:.1f} MB" for row in rows.values()))
    console.print(table)
    tokens = sorted({row["tokens"] for row in rows.values()})
    intervals = (
        "; in brackets the 95 % interval over texts" if result["config"]["bootstrap"] else ""
    )
    console.print(
        f"{next(iter(rows.values()))['texts']} texts with {' or '.join(map(str, tokens))} tokens"
        f"{intervals}."
    )
    if len(tokens) > 1:
        console.print("The tokenizers differ, so perplexity per token is not comparable.")


def _sources(teacher: str | None, students: Sequence[str]) -> dict[str, str]:
    """Return the folders of the models by name, the teacher first."""
    sources = {} if teacher is None else {TEACHER: teacher}
    for student in students:
        name, _, source = student.partition("=")
        if not name or not source:
            raise InputError(f"--student takes NAME=DIR, got {student}")
        if name in sources:
            raise InputError(f"two models are called {name}; give each a name of its own")
        sources[name] = source
    if not sources:
        raise InputError("there is no model to evaluate; name one with --student NAME=DIR")
    return sources


def _check_output(output: str | None) -> None:
    if output and Path(output).exists():
        raise InputError(f"the output {output} exists; name another, or remove it")
    if output and not Path(output).parent.is_dir():
        raise InputError(f"the output {output} cannot be written: its folder does not exist")


def _read(data: str, loaded: dict[str, Loaded], config: EvaluationConfig) -> list[Text]:
    """Return the texts for models that share a tokenizer; what the models cut is said on stderr."""
    (first, one), *others = loaded.items()
    for name, other in others:
        if tokenizer_hash(other.tokenizer) != tokenizer_hash(one.tokenizer):
            raise InputError(
                f"the tokenizers of {first} and {name} differ, so perplexity per token is not "
                "comparable; evaluate each by itself, with no --teacher"
            )
    models = {name: one.model for name, one in loaded.items()}
    widths = vocabulary_widths(models)
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        print(
            f"the vocabularies differ in width ({found}); all are cut to {min(widths.values())}",
            file=sys.stderr,
        )
    contexts = [context_length(model) or config.max_length for model in models.values()]
    length = min(config.max_length, *contexts)
    if length < config.max_length:
        print(f"texts are cut to {length} tokens, the models' context", file=sys.stderr)
    texts = read_texts(data, one.tokenizer, split="valid")[: config.max_texts]
    return fit(texts, length)[0]


def _decoding_speed(one: Loaded, prompt: list[int], num_tokens: int) -> float:
    """Return the tokens per second after the first one; texts do not end before they are full."""
    times = []
    with _endless(one.tokenizer):
        mx.synchronize()
        for _ in mlx_lm.stream_generate(one.model, one.tokenizer, prompt, num_tokens):
            times.append(time.perf_counter())
    return (len(times) - 1) / max(times[-1] - times[0], 1e-9)


@contextmanager
def _endless(tokenizer: Any) -> Iterator[None]:
    """Let no token end a text meanwhile."""
    ends = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = set()
    try:
        yield
    finally:
        tokenizer.eos_token_ids = ends


def _answers(
    name: str, one: Loaded, questions: Sequence[Question], config: EvaluationConfig
) -> dict[str, Any]:
    """Return a model's figures on questions, with intervals over questions."""
    if not questions:
        return {}
    found: dict[str, Any] = {"questions": len(questions)}
    for key, values in answer_scores(one.model, one.tokenizer, questions, name).items():
        samples = resampled(values, config.bootstrap, config.seed) / len(values)
        found[key] = with_interval(values.mean(), samples)
    return found


def _sizes(one: Loaded) -> dict[str, int]:
    """Return the number of a model's parameters and the bytes of its weights."""
    folder = Path(one.source).expanduser()
    if not folder.is_dir():
        folder = hf_repo_to_path(one.source)  # it is here since it was loaded
    return {
        "parameters": num_parameters(one.model),
        "weights_bytes": num_bytes(one.model.parameters()),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
    }


def _cell(figure: dict[str, Any] | None, form: str) -> str:
    """Return a figure and its interval."""
    if figure is None:
        return ""
    low_high = figure["interval"]
    value = "-" if math.isnan(figure["value"]) else f"{figure['value']:{form}}"
    if low_high is None:
        return value
    low, high = (f"{bound:{form}}".removesuffix("%") for bound in low_high)
    return f"{value} ({low}..{high})"


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what is infinite or not a number becomes None."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.evaluate",
        description="Measure how well a teacher and its students predict, answer and run.",
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR",
        help="the folder or hub repository of the model that the students are compared with; "
        "without it every model is measured by itself",
    )
    parser.add_argument(
        "--student",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="names and folders or hub repositories of models; the first is the one whose gap to "
        "the teacher the others close",
    )
    parser.add_argument(
        "--data", required=True, help="JSONL of held-out texts, or a folder with valid.jsonl"
    )
    parser.add_argument("--qa", metavar="JSONL", help="questions, their contexts and answers")
    add_flags(parser, EvaluationConfig)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the models' repositories run their own Python code",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as a last line of JSON"
    )
    parser.add_argument("--output", help="write everything to this JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
