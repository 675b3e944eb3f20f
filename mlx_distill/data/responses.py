"""The target's own answers: what a drafter learns from, and their file.

A drafter has to predict what *its* target writes, so the target writes the training text itself:
in batches, at several temperatures, one JSON line per answer. The file begins with a header that
says which target wrote it; a run that was stopped goes on where the file ends.
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

from mlx_distill.config import check_seed
from mlx_distill.core.sampling import Sampling
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl


@dataclass(frozen=True)
class Response:
    """One answer of the target, as token ids; EOS is the last one where the target ended it."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class ResponseConfig:
    """How the answers are written; kept in the header of their file.

    Args:
        max_tokens: The longest answer, in tokens.
        temperatures: Batch i is answered at temperature ``temperatures[i % len]``; 0 is greedy.
        response_batch_size: How many answers are written at once.
        response_seed: Makes the answers repeatable, batch by batch.
    """

    max_tokens: int = 192
    temperatures: tuple[float, ...] = (0.0, 1.0)
    response_batch_size: int = 64
    response_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "response_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperatures:
            raise InputError("temperatures must name at least one")
        for temperature in self.temperatures:
            Sampling(temperature)  # its ranges
        check_seed("response_seed", self.response_seed)


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
    header = {"target": target, "config": json.loads(json.dumps(asdict(config)))}
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
    """Return the answers to one batch; seed and temperature depend on its place, for resuming."""
    mx.random.seed(config.response_seed * 1_000_003 + start)
    temperature = config.temperatures[
        start // config.response_batch_size % len(config.temperatures)
    ]
    generator = BatchGenerator(
        model,
        max_tokens=config.max_tokens,
        stop_tokens=[[token] for token in sorted(eos_token_ids)],
        sampler=make_sampler(temperature),
        completion_batch_size=config.response_batch_size,
        prefill_batch_size=config.response_batch_size,
    )
    uids = generator.insert([list(prompt) for prompt in prompts])
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while batch := generator.next_generated():
        for response in batch:
            answers[response.uid].append(response.token)
    generator.close()
    return [answers[uid] for uid in uids]
