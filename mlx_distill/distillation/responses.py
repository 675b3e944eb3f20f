"""The target's own answers: what a drafter learns from, and their file.

A drafter has to predict what *its* target writes, so the target writes the training text itself:
in batches, at several temperatures, one JSON line per answer. The file begins with a header that
says which target wrote it; a run that was stopped goes on where the file ends. An answer that was
cut off at its longest allowed length holds no end token, so nothing learns to end there.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from mlx_distill.core.sampling import Temperature
from mlx_distill.data.report import Drop, Report
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl
from mlx_distill.limits import Count, Seed, check_fields
from mlx_distill.target.context import text_limit

FORMAT_VERSION = 2  # since then every prompt has a temperature of its own, and not every batch


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
        response_seed: Makes the answers repeatable, batch by batch.
    """

    max_tokens: Count = 192
    temperatures: tuple[Temperature, ...] = (0.0, 1.0)
    response_batch_size: Count = 64
    response_seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.temperatures:
            raise InputError("temperatures must name at least one")

    def temperature(self, row: int) -> float:
        """Return at which temperature a prompt is answered; its neighbours' are others."""
        return self.temperatures[row % len(self.temperatures)]


def write_responses(
    path: Path,
    model: nn.Module,
    eos_token_ids: set[int],
    prompts: Sequence[list[int]],
    config: ResponseConfig,
    target: dict[str, Any],
) -> Iterator[int]:
    """Append the target's answers to ``path`` and yield how many are there after each batch.

    Args:
        path: A JSONL file; it is created, or continued where it ends.
        model: The target.
        eos_token_ids: What ends an answer.
        prompts: Token ids, answered in order.
        config: How to write.
        target: The target's fingerprint, for the header.

    Raises:
        InputError: If the file was written by another target or with another configuration.
    """
    done = open_responses(path, prompts, config, target)
    for start in range(done, len(prompts), config.response_batch_size):
        batch = prompts[start : start + config.response_batch_size]
        responses = answer(model, eos_token_ids, batch, start, config)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"prompt": p, "response": r}, separators=(",", ":")) + "\n"
                for p, r in zip(batch, responses, strict=True)
            )
        yield start + len(batch)


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


def open_responses(
    path: Path, prompts: Sequence[list[int]], config: ResponseConfig, target: dict[str, Any]
) -> int:
    """Create the file, or cut what a kill left of it back to whole batches; count its answers.

    Only the last batch of the prompts may be short.

    Raises:
        InputError: If the file is none of answers, or of other ones than these would be.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "target": target,
        "config": json.loads(json.dumps(asdict(config))),
    }
    first = json.dumps(header).encode() + b"\n"
    if not path.exists():
        path.write_bytes(first)
        return 0
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
        done -= done % config.response_batch_size
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
) -> list[list[int]]:
    """Return the answers to one batch; the seed depends on its place, for resuming.

    Args:
        model: The target.
        eos_token_ids: What ends an answer.
        prompts: Token ids; one that leaves no room within the model's context has an empty answer.
        start: Which of all prompts the first one is.
        config: How to write.
    """
    mx.random.seed(config.response_seed * 1_000_003 + start)
    limit = text_limit(model)
    rooms = [limit - len(prompt) if limit else config.max_tokens for prompt in prompts]
    asked = [row for row, room in enumerate(rooms) if room > 0]
    samplers = {temperature: make_sampler(temperature) for temperature in config.temperatures}
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(eos_token_ids)],
        completion_batch_size=config.response_batch_size,
        prefill_batch_size=config.response_batch_size,
    )
    uids = generator.insert(
        [list(prompts[row]) for row in asked],
        max_tokens=[min(config.max_tokens, rooms[row]) for row in asked],
        samplers=[samplers[config.temperature(start + row)] for row in asked],
    )
    places = dict(zip(uids, asked, strict=True))
    answers: list[list[int]] = [[] for _ in prompts]
    while batch := generator.next_generated():
        for response in batch:
            answers[places[response.uid]].append(response.token)
    generator.close()
    return answers


def prompts_with_room(
    model: nn.Module, prompts: Sequence[list[int]], report: Report
) -> list[list[int]]:
    """Return the prompts that an answer can follow within what a model can read.

    The others are counted as dropped.
    """
    limit = text_limit(model)
    kept = []
    for number, prompt in enumerate(prompts, start=1):
        with report.counting(f"prompt {number}"):
            if limit is not None and len(prompt) >= limit:
                raise Drop(f"without room for an answer in the model's {limit} tokens")
            kept.append(prompt)
    report.kept = len(kept)
    return kept
