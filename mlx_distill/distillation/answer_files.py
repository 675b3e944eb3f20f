"""Answers of a target that were written before, as token ids in one ``npz`` file.

``prompt`` and ``answer`` hold the tokens of all rows, one row after the other, ``prompt_len`` and
``answer_len`` how many of them are each row's; ``greedy`` says whether a row was written at
temperature 0. May be left out: ``cls``, what kind of prompt it answers, ``ended``, whether it ends
with an end token or was cut off, and ``target``, what its writer is known by, as JSON.
"""

import json
import lzma
import os
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_distill.data.report import Drop, Report
from mlx_distill.distillation.responses import Response
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import naming, usable_path
from mlx_distill.parsing import parse_json

# What of a writer has to be a reader's; names that only one of them has are not compared.
OF_A_WRITER = ("tokenizer_hash", "hidden_size", "template_hash", "weights_hash")
NAMES = ("prompt", "prompt_len", "answer", "answer_len", "greedy")
OPTIONAL = ("cls", "target")
MOST_TOKENS = 2**31  # no vocabulary has as many
# What zipfile and numpy raise where bytes are not what they were: of a deflate stream, of the
# method and the flags of an entry (a RuntimeError, of encrypted ones), of a header of an array.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    TypeError,
    OverflowError,
    struct.error,
    tokenize.TokenError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class WrittenAnswers:
    """Answers with what is known of each.

    Args:
        responses: The prompts and answers.
        greedy: Whether each was written at temperature 0.
        kinds: What kind of prompt each answers; empty where nothing is said.
        target: What the model is known by that has written them, where it is said.
    """

    responses: list[Response]
    greedy: list[bool]
    kinds: list[str]
    target: Mapping[str, int | str] = field(default_factory=dict)

    def check(self, vocab_size: int, known: Mapping[str, int | str] | None = None) -> None:
        """Raise InputError if a model cannot have written them; say on stderr what is not known.

        Args:
            vocab_size: How many tokens it has.
            known: What it is known by; weights of another type cannot be compared.
        """
        types = [of.get("weights_type") for of in (known or {}, self.target)]
        for name in OF_A_WRITER:
            mine, theirs = (known or {}).get(name), self.target.get(name)
            if name == "weights_hash" and types[0] != types[1]:
                continue
            if mine is not None and theirs is not None and mine != theirs:
                raise InputError(
                    f"the answers are another model's: its {name.replace('_', ' ')} is "
                    f"{theirs or 'none'}, this one's is {mine or 'none'}"
                )
        if known and types[0] != types[1]:
            print(_unknown(types[1], types[0]), file=sys.stderr)
        least, most = _extremes(self.responses)
        if least < 0:
            raise InputError(f"the answers are damaged: {least} is no token")
        if most >= vocab_size:
            raise InputError(
                f"the answers are another model's: token {most} is beyond this one's {vocab_size}"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer."""
        return max(_length(one) for one in self.responses)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(one.response) for one in self.responses)

    def within(self, limit: int, report: Report) -> "WrittenAnswers":
        """Return those that a model of so many tokens can read; the others count as dropped."""
        kept = []
        for row, one in enumerate(self.responses):
            with report.counting(f"answer {row + 1}"):
                if _length(one) > limit:
                    raise Drop(f"longer than the model's {limit} tokens")
                kept.append(row)
        report.kept = len(kept)
        return self.only(kept)

    def readable(self, positions: int | None) -> "WrittenAnswers":
        """Return those that a model with so many positions can read; say what is left out.

        Args:
            positions: Rows of its table of positions; None where it computes them.

        Raises:
            InputError: If there are none.
        """
        report = Report(rows=len(self.responses), noun="answers")
        kept = self if positions is None else self.within(positions, report)
        if not kept.responses:
            raise InputError(f"no answer can be read: {report.reasons()}")
        if report.dropped:
            print(*report.lines(), sep="\n", file=sys.stderr)
        return kept

    def greedy_ones(self) -> "WrittenAnswers":
        """Return those that were written at temperature 0.

        Raises:
            InputError: If there are none.
        """
        rows = [row for row, greedy in enumerate(self.greedy) if greedy]
        if not rows:
            raise InputError("none of the answers was written at temperature 0")
        return self.only(rows)

    def only(self, rows: Sequence[int]) -> "WrittenAnswers":
        """Return some of them."""
        kinds = [self.kinds[row] for row in rows] if self.kinds else []
        greedy = [self.greedy[row] for row in rows]
        some = [self.responses[row] for row in rows]
        return WrittenAnswers(some, greedy, kinds, self.target)


def _length(one: Response) -> int:
    return len(one.prompt) + len(one.response)


def _extremes(responses: Sequence[Response]) -> tuple[int, int]:
    """Return the smallest and the largest token of some answers; 0 is among them."""
    tokens = [token for one in responses for part in (one.prompt, one.response) for token in part]
    return min(tokens, default=0), max(tokens, default=0)


def read_answers(path: str | Path) -> WrittenAnswers:
    """Return the answers of a file.

    Args:
        path: The file.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    path = usable_path(path, "the file of answers")
    arrays = _arrays(path)
    missing = [name for name in NAMES if name not in arrays]
    if missing:
        raise InputError(f"{path} holds no answers: it lacks {', '.join(missing)}")
    greedy = _greedy(path, arrays["greedy"])
    kinds = arrays.get("cls", np.zeros(0, str))
    for name in ("prompt", "answer"):
        _check(path, name, arrays[name], arrays[f"{name}_len"], len(greedy))
    if kinds.ndim != 1 or (kinds.size and len(kinds) != len(greedy)):
        raise InputError(f"{path} is damaged: {kinds.size} kinds for {len(greedy)} answers")
    prompts, answers = (
        np.split(arrays[name].astype(np.int64), np.cumsum(arrays[f"{name}_len"])[:-1])
        for name in ("prompt", "answer")
    )
    responses = [Response(p.tolist(), a.tolist()) for p, a in zip(prompts, answers, strict=True)]
    target = _target(path, arrays.get("target"))
    return WrittenAnswers(responses, greedy, [str(one) for one in kinds], target)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that answers are made of, those that it has.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no npz file")
        # numpy would leave a file of its own open where the list of entries is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files if name in (*NAMES, *OPTIONAL)}
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as answers: {one_line(error)}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of what it does not know
            raise InputError(f"{path} cannot be read as answers: {name} is no array")
    return arrays


def save_answers(path: Path, answers: WrittenAnswers, ends: Collection[int]) -> None:
    """Write answers as a file that ``read_answers`` takes; it is there when it is whole.

    Args:
        path: The file.
        answers: All of them.
        ends: Tokens that end an answer.
    """
    arrays = {}
    responses = answers.responses
    for name, rows in (
        ("prompt", [one.prompt for one in responses]),
        ("answer", [one.response for one in responses]),
    ):
        tokens = np.concatenate([np.array(row, np.uint32) for row in rows])
        arrays[name] = tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens
        arrays[f"{name}_len"] = np.array([len(row) for row in rows], np.uint32)
    arrays["greedy"] = np.array(answers.greedy)
    arrays["ended"] = np.array([one.response[-1] in ends for one in responses])
    arrays["target"] = np.array(json.dumps(dict(answers.target)))
    if answers.kinds:
        arrays["cls"] = np.array(answers.kinds)
    writing = path.with_name(path.name + ".writing")
    try:
        with naming(path), writing.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def _unknown(theirs: object, mine: object) -> str:
    if theirs is None:
        return "the file does not say what model wrote the answers; they are taken for this one's"
    return (
        f"the answers' writer had {theirs} weights, this model has {mine}: that they are the same "
        "model's is not checked"
    )


def _target(path: Path, found: np.ndarray | None) -> dict[str, int | str]:
    """Return what the writer of answers is known by, if their file says it."""
    if found is None:
        return {}
    try:
        target = parse_json(str(found))
    except InputError as error:
        raise InputError(f"{path} is damaged: its target is no JSON: {error}") from None
    if not isinstance(target, dict):
        raise InputError(f"{path} is damaged: its target is no JSON object")
    return target


def _greedy(path: Path, greedy: np.ndarray) -> list[bool]:
    """Return whether each row was written at temperature 0: truths, or the numbers 0 and 1."""
    if greedy.ndim != 1 or greedy.dtype.kind not in "biu" or not np.isin(greedy, (0, 1)).all():
        raise InputError(f"{path} is damaged: greedy is not true or false for every answer")
    return [bool(one) for one in greedy]


def _check(path: Path, name: str, tokens: np.ndarray, lengths: np.ndarray, num_rows: int) -> None:
    """Raise InputError if the tokens of all rows are not what their lengths say, or are none."""
    whole = all(np.issubdtype(x.dtype, np.integer) and x.ndim == 1 for x in (tokens, lengths))
    fits = whole and tokens.size and 0 < num_rows == len(lengths)
    # Each length by itself first: a sum of large ones may wrap to what it should be.
    fits = fits and bool(((lengths > 0) & (lengths <= tokens.size)).all())
    if not (fits and sum(lengths.tolist()) == tokens.size):
        raise InputError(f"{path} is damaged: {name} and {name}_len do not fit each other")
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < MOST_TOKENS:
            raise InputError(f"{path} is damaged: {name} holds {token}, which is no token")
