"""The target's own answers: what a drafter learns from, and their file.

A drafter has to predict what *its* target writes, so the target writes the training text itself:
many at once, at several temperatures, one JSON line per answer. The file begins with a header that
says which target wrote it; a run that was stopped goes on where the file ends. An answer that was
cut off at its longest allowed length holds no end token, so nothing learns to end there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from mlx import nn

from mlx_distill.core.sampling import Temperature
from mlx_distill.data.report import Drop, Report
from mlx_distill.distillation.answer_batch import Wanted, written
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl
from mlx_distill.limits import Count, Seed, check_fields
from mlx_distill.target.context import text_limit

FORMAT_VERSION = 3  # since then what is drawn for an answer follows from its number alone
# What writes answers, so many at once: they come as they end, behind their numbers.
Write: TypeAlias = Callable[[Sequence[Wanted], int], Iterator[tuple[int, list[int]]]]
PART = 8  # batches whose answers are kept together: few rows wait for its longest answer


@dataclass(frozen=True)
class Response:
    """One answer of the target, as token ids; EOS is the last one where the target ended it."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class ResponseConfig:
    """How the answers are written; kept in the header of their file.

    Args:
        max_tokens: The longest answer, in tokens. It ends where the model's context does, too.
        temperatures: The i-th prompt is answered at the i-th of them, over and over; 0 is greedy.
        response_batch_size: How many answers are written at once.
        response_seed: Makes the answers repeatable.
    """

    max_tokens: Count = 192
    temperatures: tuple[Temperature, ...] = (0.0, 1.0)
    response_batch_size: Count = 64
    response_seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.temperatures:
            raise InputError("temperatures must name at least one")

    @property
    def part(self) -> int:
        """How many answers are kept together."""
        return PART * self.response_batch_size

    def temperature(self, row: int) -> float:
        """Return at which temperature a prompt is answered; its neighbours' are others."""
        return self.temperatures[row % len(self.temperatures)]


def write_responses(
    path: Path,
    model: nn.Module,
    eos_token_ids: set[int],
    prompts: Sequence[list[int]],
    config: ResponseConfig,
    target: Mapping[str, Any],
    ended: Callable[[], Any] = lambda: None,
    write: Write | None = None,
) -> Iterator[int]:
    """Append the target's answers to ``path`` and yield how many are there after each part.

    Args:
        path: A JSONL file; it is created, or continued where it ends.
        model: The target.
        eos_token_ids: What ends an answer.
        prompts: Token ids, answered in order.
        config: How to write.
        target: The target's fingerprint, for the header.
        ended: Called for every answer that ends, before those of its part are appended.
        write: Writes them instead of mlx-lm's batches; the header has to say so.

    Raises:
        InputError: If the file was written by another target or with another configuration.
    """
    done = open_responses(path, prompts, config, target)
    for start in range(done, len(prompts), config.part):
        part = prompts[start : start + config.part]
        responses = answer(model, eos_token_ids, part, start, config, ended, write)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"prompt": p, "response": r}, separators=(",", ":")) + "\n"
                for p, r in zip(part, responses, strict=True)
            )
        yield start + len(part)


def header_of(path: Path) -> Mapping[str, Any] | None:
    """Return what a file that was begun says of the answers' writer; None if there is none."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            target = json.loads(file.readline())["target"]
    except (ValueError, KeyError, TypeError):  # killed while it was written, or another file
        return None
    return target if isinstance(target, dict) else None


def read_responses(path: Path) -> list[Response]:
    """Return the answers of a file that ``write_responses`` has made.

    Raises:
        InputError: If the file is not one, or is damaged.
    """
    _, *rows = read_jsonl(path)
    responses = []
    for place, row in rows:
        if not all(_is_tokens(row.get(name)) for name in ("prompt", "response")):
            raise InputError(f"{place}: expected a prompt and a response as token ids")
        responses.append(Response(row["prompt"], row["response"]))
    return responses


def responses_hash(responses: Sequence[Response], kinds: Sequence[int] = ()) -> str:
    """Return a hash of the tokens of prompts and answers, in order.

    Args:
        responses: All of them.
        kinds: Of each, how it was written, where that decides which are held out.
    """
    digest = hashlib.sha256(np.array([len(responses), *kinds], "<i8").tobytes())
    for one in responses:
        row = [len(one.prompt), len(one.response), *one.prompt, *one.response]
        digest.update(np.array(row, "<i8").tobytes())
    return digest.hexdigest()[:16]


def open_responses(
    path: Path, prompts: Sequence[list[int]], config: ResponseConfig, target: Mapping[str, Any]
) -> int:
    """Create the file, or cut what a kill left of it back to whole parts; count its answers.

    Only the last part of the prompts may be short.

    Raises:
        InputError: If the file is none of answers, or of other ones than these would be.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "target": dict(target),
        "config": json.loads(json.dumps(asdict(config))),
    }
    first = json.dumps(header).encode() + b"\n"
    if not path.exists():
        path.write_bytes(first)
        return 0
    if not path.is_file():
        raise InputError(f"{path} is no file but a folder, a pipe or a device")
    data = path.read_bytes()
    if first.startswith(data):  # killed while the header was written
        path.write_bytes(first)
        return 0
    lines = data.splitlines(keepends=True)
    if lines[0] != first:
        raise InputError(
            f"{path} was written by another target or with other settings, or holds no answers; "
            "remove it or name another"
        )
    if not lines[-1].endswith(b"\n"):
        lines.pop()
    done = min(len(lines) - 1, len(prompts))
    if done < len(prompts):
        done -= done % config.part
    kept = lines if done == len(prompts) else lines[: done + 1]
    if sum(map(len, kept)) != len(data):
        path.write_bytes(b"".join(kept))
    answers = read_responses(path)[:done]
    if any(answer.prompt != prompt for answer, prompt in zip(answers, prompts, strict=False)):
        raise InputError(f"{path} answers other prompts; remove it or name another")
    return done


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def answer(
    model: nn.Module,
    eos_token_ids: set[int],
    prompts: Sequence[list[int]],
    start: int,
    config: ResponseConfig,
    ended: Callable[[], Any] = lambda: None,
    write: Write | None = None,
) -> list[list[int]]:
    """Return the answers to some prompts; what is drawn depends on their numbers, for resuming.

    Args:
        model: The target.
        eos_token_ids: What ends an answer.
        prompts: Token ids; one that leaves no room within the model's context has an empty answer.
        start: Which of all prompts the first one is.
        config: How to write.
        ended: Called for every answer that ends.
        write: Writes them instead of mlx-lm's batches.
    """
    limit = text_limit(model)
    rooms = [limit - len(prompt) if limit else config.max_tokens for prompt in prompts]
    asked = [row for row, room in enumerate(rooms) if room > 0]
    asked.sort(key=lambda row: -len(prompts[row]))  # those that begin together are alike
    wanted = [
        Wanted(
            prompts[row],
            min(config.max_tokens, rooms[row]),
            config.temperature(start + row),
            (config.response_seed * 1_000_003 + start + row) % 2**32,
        )
        for row in asked
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = config.response_batch_size
    found = write(wanted, rows) if write else written(model, wanted, eos_token_ids, rows, limit)
    for place, tokens in found:
        answers[asked[place]] = tokens
        ended()
    return answers


def rows_with_room(model: nn.Module, prompts: Sequence[list[int]], report: Report) -> list[int]:
    """Return which prompts an answer can follow within what a model can read.

    The others are counted as dropped.
    """
    limit = text_limit(model)
    rows = []
    for row, prompt in enumerate(prompts):
        with report.counting(f"prompt {row + 1}"):
            if limit is not None and len(prompt) >= limit:
                raise Drop(f"without room for an answer in the model's {limit} tokens")
            rows.append(row)
    report.kept = len(rows)
    return rows
