"""A target's answers as a file of their own, to learn from later, elsewhere and often."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx import nn
from tqdm import tqdm

from mlx_distill.calibration.store import drafter_hash
from mlx_distill.data.report import Report
from mlx_distill.data.tokens import usable_tokenizer
from mlx_distill.distillation.answer_files import WrittenAnswers, save_answers
from mlx_distill.distillation.drafted_answers import drafted, drafter_that_pays
from mlx_distill.distillation.responses import (
    Response,
    ResponseConfig,
    Write,
    header_of,
    read_responses,
    rows_with_room,
    write_responses,
)
from mlx_distill.drafters.fingerprint import Fingerprint, fingerprint
from mlx_distill.drafters.registry import bundled_drafter
from mlx_distill.errors import InputError
from mlx_distill.files import new_path
from mlx_distill.hashes import template_hash, weights_hash, weights_type
from mlx_distill.locks import locked
from mlx_distill.target.context import text_limit
from mlx_distill.target.reading import check_tokens
from mlx_distill.target.target import Target


def write_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    path: str | Path,
    config: ResponseConfig,
    *,
    report: Report | None = None,
    quiet: bool = False,
) -> WrittenAnswers:
    """Write a model's answers to prompts as an ``npz`` file that a training takes; return them.

    They are kept in ``PATH.jsonl`` as they come; what was stopped goes on from there.

    Args:
        model: Writes them.
        tokenizer: Its tokenizer.
        prompts: Token ids, as ``read_prompts`` returns them.
        path: The file; must not exist.
        config: How to write.
        report: What became of the rows that the prompts were made of.
        quiet: Draw no progress bar.

    Raises:
        InputError: If the file exists or cannot be written, or
            what was kept answers other prompts, or in another way.
    """
    path, tokenizer = new_path(path), usable_tokenizer(tokenizer)
    if not path.parent.is_dir():
        raise InputError(f"the output {path} cannot be written: its folder does not exist")
    report = report or Report(rows=len(prompts))
    prompts = usable_prompts(model, prompts, config, report)
    check_enough(len(prompts), 0, "prompts", report)
    kept = path.with_name(path.name + ".jsonl")
    start = time.perf_counter()
    target = writer(model, tokenizer)
    with locked(kept):
        responses = answered(kept, model, tokenizer, prompts, config, target, quiet)
        greedy = [config.temperature(row) == 0 for row in range(len(responses))]
        answers = WrittenAnswers(responses, greedy, [], origin(model, tokenizer))
        save_answers(new_path(path), answers, tokenizer.eos_token_ids)
        kept.unlink()
    seconds = time.perf_counter() - start
    print(_sentence(answers, tokenizer.eos_token_ids, seconds), file=sys.stderr)
    return answers


def writer(model: nn.Module, tokenizer: Any) -> Fingerprint:
    """Return what answers know the model by that has written them."""
    return {**fingerprint(Target.of(model), tokenizer), "weights_hash": weights_hash(model)}


def origin(model: nn.Module, tokenizer: Any) -> Fingerprint:
    """Return what a file of answers says of its writer, for whoever learns from it elsewhere."""
    return {
        **writer(model, tokenizer),
        "weights_type": weights_type(model),
        "template_hash": template_hash(tokenizer),
    }


def usable_prompts(
    model: nn.Module, prompts: Sequence[list[int]], config: ResponseConfig, report: Report
) -> list[list[int]]:
    """Return the prompts that can be answered; the report counts the others.

    Raises:
        InputError: If answers may be longer than what the model reads, or a prompt is empty or of
            tokens that it does not have.
    """
    if not all(prompts):
        raise InputError("a prompt is empty; give at least one token")
    if prompts:
        check_tokens(model, prompts, "prompts")
    limit, wanted = text_limit(model), config.max_tokens
    if limit is not None and wanted > limit:
        raise InputError(
            f"answers of {wanted} tokens are too long: the model's context is {limit}; "
            "use a smaller --max-tokens"
        )
    return [prompts[row] for row in rows_with_room(model, prompts, report)]


def check_enough(kept: int, held_out: int, noun: str, report: Report) -> None:
    """Say on stderr what was dropped.

    Raises:
        InputError: If nothing remains beside what is held out.
    """
    lines = report.lines() if report.dropped else []
    if kept <= held_out:
        lost = "".join(f"; {line}" for line in lines[1:])
        raise InputError(f"{kept} {noun} are too few: {held_out} are held out{lost}")
    for line in lines:
        print(line, file=sys.stderr)


def answered(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    config: ResponseConfig,
    target: Fingerprint,
    quiet: bool,
) -> list[Response]:
    """Let a model answer the prompts that it has not answered yet; return all the answers.

    Args:
        path: Where they are kept.
        model: Writes them.
        tokenizer: Its tokenizer.
        prompts: All of them.
        config: How to write.
        target: What the file knows the model by.
        quiet: Draw no progress bar.
    """
    title = "the target writes"
    target, write = _way(path, model, tokenizer, config, target)
    with tqdm(total=len(prompts), unit="answer", desc=title, leave=False, disable=quiet) as bar:
        ends = tokenizer.eos_token_ids
        ways = config, target, bar.update, write
        for count in write_responses(path, model, ends, prompts, *ways):
            bar.update(count - bar.n)
    return read_responses(path)[: len(prompts)]


def _way(
    path: Path, model: nn.Module, tokenizer: Any, config: ResponseConfig, target: Fingerprint
) -> tuple[Fingerprint, Write | None]:
    """Return what the file says of its writer, and what writes the answers if not mlx-lm.

    What was begun without a drafter goes on without: its answers are drawn with other numbers.
    """
    begun = header_of(path)
    drafter = None
    if begun is None:
        drafter = drafter_that_pays(model, tokenizer, config.response_batch_size)
    elif begun.get("drafter"):
        found = bundled_drafter(model, tokenizer)
        drafter = None if found is None else found[1]
    if drafter is None:
        return target, None
    told = {**target, "drafter": drafter_hash(drafter)}
    return told, partial(drafted, model, tokenizer, drafter)


def _sentence(answers: WrittenAnswers, ends: set[int], seconds: float) -> str:
    ended = sum(one.response[-1] in ends for one in answers.responses)
    count = len(answers.responses)
    return (
        f"{count:,} answers, {answers.num_tokens:,} tokens, {100 * ended / count:.0f} % ended by "
        f"themselves, in {seconds:.0f} s"
    )
