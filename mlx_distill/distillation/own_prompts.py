r"""Prompts without data: the target writes its user's turns itself, and a list of seeds joins them.

A chat model is given what its template writes in front of a user's first words, and goes on:

    <|im_start|>user\n                                   the opening, as the template writes it
    How do I keep tomato plants from wilting?<|im_end|>  drawn at temperature 1, until the turn ends

What it draws is what it takes for a user's turn. What is too short, cut off, in no one script, says
the same again or was there before is dropped and counted. The seeds are short requests of all kinds
in ``data/seed_prompts.jsonl``; they were written for this package and are under its licence.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx import nn

import mlx_distill.data
from mlx_distill.data.chats import MARK, Chat, apply_template
from mlx_distill.data.report import Drop, Report
from mlx_distill.data.user_turns import fault, key, rare_scripts, script
from mlx_distill.distillation.answer_batch import Wanted, written
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl
from mlx_distill.target.context import text_limit

SEEDS = Path(str(mlx_distill.data.__file__)).with_name("seed_prompts.jsonl")
TURN_TOKENS = 192  # of the longest turn
ROUNDS = 5  # of drawing until there are enough
MORE = 1.3  # turns are drawn for one that is missing


@dataclass(frozen=True)
class Opening:
    """Where a user's turn is written.

    Args:
        ids: Tokens of what stands before it.
        closing: What the template writes behind it, up to the next line.
    """

    ids: list[int]
    closing: str


def own_prompts(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    *,
    rows: int,
    seed: int = 0,
    template_config: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> list[str]:
    """Return user's turns, the seeds among them: as many as asked, or fewer if most were dropped.

    Args:
        model: The target.
        tokenizer: Its tokenizer, with a chat template.
        count: How many there should be.
        rows: How many turns are written at once.
        seed: Of what is drawn.
        template_config: Further arguments of the chat template.
        report: Counts what is drawn and dropped.

    Raises:
        InputError: If the model has no chat template, or one that says nothing of users' turns.
    """
    report = report or Report(noun="prompts")
    opening = user_opening(tokenizer, template_config)
    seeds = [row["prompt"] for _, row in read_jsonl(SEEDS)]
    seeds = seeds[:: max(1, -(-2 * len(seeds) // count))]  # at most half of what is asked for
    report.rows += len(seeds)
    turns: list[str] = []
    known = {key(text) for text in seeds}
    drawn = 0
    for _ in range(ROUNDS):
        missing = count - len(seeds) - len(turns)
        if missing <= 0:
            break
        wanted = [
            Wanted(opening.ids, TURN_TOKENS, 1.0, (seed * 1_000_003 + drawn + row) % 2**32)
            for row in range(int(MORE * missing) + 1)
        ]
        for number, text in _turns(model, tokenizer, opening, wanted, rows):
            report.rows += 1
            with report.counting(f"turn {drawn + number + 1}"):
                turns.append(_checked(text, known))
        drawn += len(wanted)
        turns = _usual(turns, report)
    kept = _mixed(seeds, turns[: max(0, count - len(seeds))])
    for number in range(len(kept), len(seeds) + len(turns)):
        report.drop("more than were asked for", f"turn {number + 1}")
    report.kept += len(kept)
    return kept


def user_opening(tokenizer: Any, template_config: Mapping[str, Any] | None = None) -> Opening:
    """Return where a chat's template has its user begin.

    Raises:
        InputError: If there is no template, or a user's words cannot be found in what it writes.
    """
    if not getattr(tokenizer, "has_chat_template", False):
        raise InputError(
            "the model has no chat template, so it cannot write prompts itself; name some with "
            "--data"
        )
    chat = Chat([{"role": "user", "content": MARK}])
    text = apply_template(
        tokenizer, chat, template_config, tokenize=False, add_generation_prompt=True
    )
    before, found, behind = text.partition(MARK) if isinstance(text, str) else ("", "", "")
    if not found or not before:
        raise InputError(
            "the model's chat template has no opening of a user's turn, so it cannot write prompts "
            "itself; name some with --data"
        )
    ids = tokenizer.encode(before, add_special_tokens=False)
    return Opening(list(ids), behind.strip().partition("\n")[0])


def as_rows(texts: Sequence[str]) -> str:
    """Return prompts as the content of a file that ``--data`` takes."""
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)


def _turns(
    model: nn.Module, tokenizer: Any, opening: Opening, wanted: Sequence[Wanted], rows: int
) -> Iterator[tuple[int, str | None]]:
    """Yield turns in order, each behind its number; None for one that did not end."""
    limit = text_limit(model)
    if limit is not None and len(opening.ids) + TURN_TOKENS > limit:
        raise InputError(
            f"the model reads {limit} tokens, too few to write prompts itself; name some with "
            "--data"
        )
    ends = set(tokenizer.eos_token_ids)
    answers = dict(written(model, wanted, ends, rows, limit))
    for number in range(len(wanted)):
        ids = answers[number]
        is_whole = ids[-1] in ends
        text = tokenizer.decode(ids[:-1] if is_whole else ids)
        if opening.closing and opening.closing in text:
            text, is_whole = text.partition(opening.closing)[0], True
        yield number, text.strip() if is_whole else None


def _checked(text: str | None, known: set[tuple[str, ...]]) -> str:
    """Return a turn; raise Drop if it is no prompt, or known."""
    if text is None:
        raise Drop(f"longer than {TURN_TOKENS} tokens")
    if reason := fault(text):
        raise Drop(reason)
    if key(text) in known:
        raise Drop("beginning like another")
    known.add(key(text))
    return text


def _usual(turns: list[str], report: Report) -> list[str]:
    """Return the turns in scripts that are not rare among them."""
    rare, kept = rare_scripts(turns), []
    for number, text in enumerate(turns):
        with report.counting(f"kept turn {number + 1}"):
            if script(text) in rare:
                raise Drop("in a script that hardly any other has")
            kept.append(text)
    return kept


def _mixed(seeds: Sequence[str], turns: Sequence[str]) -> list[str]:
    """Return both, the seeds spread evenly, so that the first few hold some of each."""
    places = [((number + 0.5) / len(seeds), text) for number, text in enumerate(seeds)]
    places += [((number + 0.5) / len(turns), text) for number, text in enumerate(turns)]
    return [text for _, text in sorted(places, key=lambda place: place[0])]
