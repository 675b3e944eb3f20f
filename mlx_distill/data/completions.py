"""Stored completions of a teacher, for distillation from text alone.

A JSONL file comes as mlx-lm trains on it, as OpenAI stores or batches it, or as Amazon Bedrock logs
or batches it; every row is recognised by itself and becomes a chat that ends with the answer:

    {"input": "Hi", "output": "Hello!", "score": 0.9}
        messages  user "Hi", assistant "Hello!"
        metadata  score 0.9

What is missing, failed or filtered is counted with its place, never skipped in silence.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

from mlx_distill.data.completion_layouts import UNKNOWN, Completion, row_completions
from mlx_distill.data.condition import Undecided, compile_where
from mlx_distill.data.encoding import encode_row
from mlx_distill.data.prompts import is_templated
from mlx_distill.data.report import Drop, Report
from mlx_distill.data.rows import TRUNCATED
from mlx_distill.data.sources import read_rows
from mlx_distill.data.texts import Text
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, check_fields

REFUSAL_CHARS = 200

# What refusals begin with, apostrophes straight; what is quoted, as people's words are in stories,
# does not count.
REFUSALS = (
    r"\bsorry,? (?:but )?I(?: can(?:'t|not| not)| won't|(?: am|'m) (?:unable|not able))\b",
    r"\bsorry,? but as an? (?:AI|large|language)\b",
    r"\bas an? (?:AI|artificial intelligence|large|language)(?: language)? (?:model|assistant)\b",
    r"\bas an AI,",
    r"\bI(?: can(?:'t|not| not)| won't|(?: am|'m) (?:unable|not able) to)"
    r" (?:assist|comply|fulfil|help (?:you )?with)",
)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
_QUOTED = re.compile('"[^"]*"?|\u201c[^\u201d]*\u201d?')
_APOSTROPHES = re.compile("[\u2018\u2019\u02bc]")

# Why an answer ended, in lower case: OpenAI's words, Anthropic's and Bedrock's.
REFUSED = {"refusal", "content_filter", "content_filtered", "guardrail_intervened"}


@dataclass(frozen=True)
class CompletionFilter:
    """Which stored completions are learned.

    Args:
        min_answer_chars: The shortest answer, in characters.
        max_answer_chars: The longest answer, in characters. Without it, any.
        drop_duplicates: Leave out what differs in white space alone from one that is kept.
        drop_refusals: Leave out answers that begin like a refusal or are marked as one.
        drop_truncated: Leave out answers that ended at their longest allowed length.
        where: A condition on the metadata, such as ``model == "x" and score >= 0.8``.
    """

    min_answer_chars: Count = 1
    max_answer_chars: Annotated[int | None, Between(1, 10**9)] = None
    drop_duplicates: bool = True
    drop_refusals: bool = True
    drop_truncated: bool = True
    where: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_answer_chars is not None and self.max_answer_chars < self.min_answer_chars:
            raise InputError(
                f"max_answer_chars must be at least min_answer_chars ({self.min_answer_chars}), "
                f"got {self.max_answer_chars}"
            )
        if self.where is not None:
            compile_where(self.where)


def read_completions(path: str | Path, filter: CompletionFilter) -> tuple[list[Completion], Report]:
    """Return the completions of a file that pass the filter, and what became of its rows.

    Args:
        path: A JSONL file, also compressed, or a parquet file; every row may have a layout of its
            own.
        filter: What is kept.

    Raises:
        InputError: If the file cannot be read, a line is no JSON object, no row has a known
            layout, or nothing is left.
    """
    report = Report()
    check = _checker(filter)
    completions = []
    for place, row in read_rows(path):
        report.rows += 1
        with report.counting(place):
            for completion in row_completions(row, place, report):
                with report.counting(completion.place):
                    check(completion)
                    completions.append(completion)
    report.kept = len(completions)
    if report.rows and report.dropped[UNKNOWN] == report.rows:
        keys = sorted({key for _, row in read_rows(path) for key in row})
        raise InputError(
            f"{path} has no row of a known layout (mlx-lm, OpenAI, Amazon Bedrock); the keys are "
            f"{', '.join(keys[:20]) or 'none'}"
        )
    if not completions:
        raise InputError(
            f"{path} leaves no completions of {report.rows} rows: {report.reasons() or 'empty'}"
        )
    return completions, report


def completion_texts(
    completions: Sequence[Completion],
    tokenizer: Any,
    learn_prompts: bool = False,
    *,
    template_config: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> list[Text]:
    """Return the completions as token ids.

    Without a chat template a question and its answer are written as they are, behind the system's
    text and a blank line.

    Args:
        completions: From ``read_completions``.
        tokenizer: An mlx-lm tokenizer; its chat template writes the chats.
        learn_prompts: Also learn the prompts, not the answers alone.
        template_config: Further arguments of the chat template.
        report: Counts answers that cannot be found in what the template writes.

    Raises:
        InputError: If a chat of several turns, or ``template_config``, has no template to be
            written with, or it fails.
    """
    template = is_templated(tokenizer, True, template_config)
    return [
        encode_row(
            _mlx_lm_row(completion, template),
            tokenizer,
            completion.place,
            learn_prompts,
            ended=(completion.finish_reason or "").lower() not in TRUNCATED,
            template_config=template_config,
            report=report,
        )
        for completion in completions
    ]


def _mlx_lm_row(completion: Completion, template: bool) -> dict[str, Any]:
    """Return a completion in mlx-lm's layout."""
    messages = completion.messages
    if messages is None:
        return {"text": completion.text}
    if template:
        return {"messages": messages, **completion.template}
    *systems, question, answer = messages
    if question["role"] != "user" or any(message["role"] != "system" for message in systems):
        raise InputError(
            f"{completion.place}: a chat of several turns needs a tokenizer with a chat template; "
            "this has none"
        )
    prompt = "\n\n".join(message["content"] for message in (*systems, question))
    return {"prompt": prompt, "completion": answer["content"]}


def _checker(filter: CompletionFilter) -> Callable[[Completion], None]:
    """Return what raises Drop for a completion that the filter leaves out."""
    where = compile_where(filter.where) if filter.where is not None else None
    seen: set[bytes] = set()

    def check(completion: Completion) -> None:
        num_chars = len(completion.answer.strip())
        ended = (completion.finish_reason or "").lower()
        if num_chars < filter.min_answer_chars:
            raise Drop("answer too short")
        if filter.max_answer_chars is not None and num_chars > filter.max_answer_chars:
            raise Drop("answer too long")
        if filter.drop_truncated and ended in TRUNCATED:
            raise Drop("truncated")
        if filter.drop_refusals and (ended in REFUSED or is_refusal(completion.answer)):
            raise Drop("refusal")
        try:
            if where is not None and not where(completion.metadata):
                raise Drop("where is false")
        except Undecided as error:
            raise Drop(str(error)) from None
        # The last check, so that a row that is dropped hides no twin that could be kept.
        if filter.drop_duplicates:
            key = _fingerprint(completion)
            if key in seen:
                raise Drop("duplicate")
            seen.add(key)

    return check


def is_refusal(answer: str) -> bool:
    """Return whether an answer begins like a refusal."""
    opening = _QUOTED.sub(" ", answer.strip()[:REFUSAL_CHARS])
    return _REFUSAL.search(_APOSTROPHES.sub("'", opening)) is not None


def _fingerprint(completion: Completion) -> bytes:
    """Return the same few bytes for texts that differ in white space alone."""
    messages = completion.messages or [{"role": "", "content": completion.text or ""}]
    squeezed = [[message["role"], *message["content"].split()] for message in messages]
    asked = [squeezed, completion.template.get("tools")]
    return blake2b(json.dumps(asked).encode(), digest_size=16).digest()
