"""Rows of data as token ids, with what is learned of them marked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.data.chats import write_chat
from mlx_distill.data.prompts import encode_prompt, is_templated
from mlx_distill.data.report import LOST, Report
from mlx_distill.data.rows import TRUNCATED, Row, read_row, why_ended
from mlx_distill.data.sources import local_file, read_rows
from mlx_distill.data.texts import Source, Text
from mlx_distill.data.tokens import encode_behind, encode_text, tokens_before, usable_tokenizer
from mlx_distill.errors import InputError


def read_texts(
    source: str | Path,
    tokenizer: Any,
    *,
    learn_prompts: bool = False,
    split: str = "train",
    template_config: Mapping[str, Any] | None = None,
    prompts: bool = False,
    report: Report | None = None,
) -> list[Text]:
    """Return the texts of a file, a folder with one per split, or a hub dataset.

    Args:
        source: A file, a folder, or the name of a hub dataset (see ``sources.local_file``).
        tokenizer: An mlx-lm tokenizer; its chat template writes prompts and messages.
        learn_prompts: Also learn the prompts, not the answers alone.
        split: Which file of a folder or a dataset.
        template_config: Further arguments of the chat template.
        prompts: Take questions without an answer, too; nothing is learned of them.
        report: Counts what is read and dropped.

    Raises:
        InputError: If there is no such file, a row cannot be used, or there are no rows; or if
            there is no template for ``template_config``.
    """
    tokenizer = usable_tokenizer(tokenizer)
    is_templated(tokenizer, True, template_config)
    path = local_file(source, split)
    report = Report() if report is None else report
    texts = []
    for place, row in read_rows(path):
        report.rows += 1
        with report.counting(place):
            text = encode_row(
                row,
                tokenizer,
                place,
                learn_prompts,
                template_config=template_config,
                prompts=prompts,
                report=report,
            )
            texts.append(text)
            report.kept += 1
    if not texts:
        raise InputError(
            f"{path} holds no texts" + (f": {report.reasons()}" if report.dropped else "")
        )
    return texts


def encode_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    place: str,
    learn_prompts: bool = False,
    ended: bool = True,
    *,
    template_config: Mapping[str, Any] | None = None,
    prompts: bool = False,
    report: Report | None = None,
) -> Text:
    """Return the text of one row; see ``rows`` for the layouts.

    A text that did not end, but was cut off, gets no end.

    Args:
        row: As it stands in the file.
        tokenizer: An mlx-lm tokenizer.
        place: Where the row stands.
        learn_prompts: Also learn the prompts.
        ended: Whether the text, or the last answer, came to its end; a row may say that it did not.
        template_config: Further arguments of the chat template.
        prompts: Take a question without an answer.
        report: Counts answers that cannot be found in what the template writes.

    Raises:
        InputError: If the row cannot be used.
        Drop: If it holds nothing to learn.
    """
    known = read_row(row, place, prompts=prompts)
    ended = ended and (why_ended(row) or "").lower() not in TRUNCATED
    template = bool(getattr(tokenizer, "has_chat_template", False))
    if known.document is not None:
        tokens = _ended(encode_text(tokenizer, known.document), tokenizer, ended)
        return Text(tokens, source=Source(place, ended=ended))
    source = Source(place, known.chat, template, ended)
    if not known.answered and prompts:
        try:
            return _question(known, tokenizer, source, template_config)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error.__cause__
    if not known.answered:
        raise InputError(f"{place}: the last message must be the assistant's, to learn from")
    if known.pair and not template:
        text = _bare(known, tokenizer, source)
    elif template:
        text = _templated(tokenizer, source, template_config, report)
    else:
        raise InputError(
            f"{place}: a chat needs a tokenizer with a chat template; this has none (rows "
            "with prompt and completion need none)"
        )
    return Text(text.tokens, source=text.source) if learn_prompts else text


def _ended(tokens: list[int], tokenizer: Any, ended: bool) -> list[int]:
    """Return tokens with the one that ends a text, unless it is there or the text has no end."""
    end = tokenizer.eos_token_id
    return tokens if end is None or not ended or tokens[-1:] == [end] else [*tokens, end]


def _bare(row: Row, tokenizer: Any, source: Source) -> Text:
    """Return a question and its answer as they are."""
    question, answer = (message["content"] for message in row.chat.messages)
    asked = encode_prompt(tokenizer, question, chat_template=False)
    said = encode_behind(tokenizer, question, asked, answer)
    tokens = _ended([*asked, *said], tokenizer, source.ended)
    source = replace(source, answers=((1, len(asked), len(tokens)),))
    return Text.behind(tokens, len(asked), source)


def _question(
    row: Row, tokenizer: Any, source: Source, template_config: Mapping[str, Any] | None
) -> Text:
    """Return a question alone, of which nothing is learned."""
    asked = row.chat if source.templated or row.question is None else row.question
    config = template_config if source.templated else None
    tokens = encode_prompt(tokenizer, asked, template_config=config)
    return Text(tokens, [False] * len(tokens), source)


def _templated(
    tokenizer: Any,
    source: Source,
    template_config: Mapping[str, Any] | None,
    report: Report | None,
) -> Text:
    """Return a chat as the template writes it, with every answer marked."""
    assert source.chat is not None
    try:
        written = write_chat(tokenizer, source.chat, template_config, source.ended)
    except InputError as error:
        raise InputError(f"{source.place}: {error}") from error.__cause__
    tokens = encode_text(tokenizer, written.text, special=False)
    learned = np.zeros(len(tokens), bool)
    answers = []
    for answer in written.answers:
        before = {
            place: tokens_before(tokenizer, written.text, place, tokens)
            for place in {answer.start, answer.content, answer.stop}
        }
        start, content, stop = (before[x] for x in (answer.start, answer.content, answer.stop))
        learned[start:stop] = True
        answers.append((answer.message, content, stop))
    lost = written.lost > 0
    if lost and report is not None:
        report.change(LOST, source.place)
    return Text(tokens, learned.tolist(), replace(source, answers=tuple(answers), lost=lost))
