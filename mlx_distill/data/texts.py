"""Texts to learn from, as token ids, and what is learned of them.

Of a document all is learned but its first token; of a chat every answer and what ends it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.chats import Chat, write_chat
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.data.report import Report
from mlx_distill.data.rows import Row, read_row
from mlx_distill.data.sources import local_file, read_rows
from mlx_distill.data.tokens import encode_text, tokens_before
from mlx_distill.errors import InputError

LONG = ("cut", "drop", "refuse")


@dataclass(frozen=True)
class Source:
    """What a text was made of, for those who read it otherwise, and for complaints.

    Args:
        place: The file and the line.
        chat: None for a document.
        templated: A chat template wrote it; its marks belong together, so it is never cut.
        ended: False if it was cut off.
        answers: Of a chat, which message is learned from which token to which; a message that the
            chat has not is the text's own.
    """

    place: str
    chat: Chat | None = None
    templated: bool = False
    ended: bool = True
    answers: tuple[tuple[int, int, int], ...] = ()

    @property
    def file(self) -> str:
        """The file alone."""
        return self.place.rpartition(", ")[0]


@dataclass(frozen=True, init=False)
class Text:
    """One text.

    Args:
        tokens: Its token ids.
        learned: Which of them are learned, that is predicted from those before them; never the
            first, which has none. None for all the others.
        source: What it was made of, where that is known.
    """

    tokens: list[int]
    learned: tuple[bool, ...]
    source: Source | None = field(compare=False)

    def __init__(
        self,
        tokens: list[int],
        learned: Iterable[bool] | None = None,
        source: Source | None = None,
    ) -> None:
        marks = [True] * len(tokens) if learned is None else [bool(one) for one in learned]
        if len(marks) != len(tokens):
            raise ValueError(f"{len(marks)} marks do not fit {len(tokens)} tokens")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "learned", (False, *marks[1:])[: len(tokens)])
        object.__setattr__(self, "source", source)

    @classmethod
    def behind(cls, tokens: list[int], start: int, source: Source | None = None) -> "Text":
        """Return a text of which all is learned but its first ``start`` tokens."""
        return cls(tokens, [place >= start for place in range(len(tokens))], source)

    @property
    def num_learned(self) -> int:
        """Number of learned tokens."""
        return sum(self.learned)

    @property
    def place(self) -> str:
        """Where it comes from, for complaints."""
        return self.source.place if self.source else "a text"

    def upto(self, stop: int) -> "Text":
        """Return the first tokens as a text of its own, which does not end where they do."""
        source = self.source
        if source:
            answers = [
                (m, start, min(end, stop)) for m, start, end in source.answers if start < stop
            ]
            source = replace(source, ended=False, answers=tuple(answers))
        return Text(self.tokens[:stop], self.learned[:stop], source)

    def answers(self) -> list[tuple[int, int]]:
        """Return where learned tokens stand in a row, each from its first to behind its last."""
        edges = np.flatnonzero(np.diff([False, *self.learned, False])).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class TextBatch:
    """Texts of one step, padded on the right.

    Args:
        tokens: Token ids; padding is 0.
        mask: 1 where the token that follows position t is to be learned.
        rows: Which texts they are, of those that are learned; nothing where they are others.
        texts: The texts, for teachers that read them otherwise.
    """

    tokens: mx.array
    mask: mx.array
    rows: list[int]
    texts: Sequence[Text] = ()

    @property
    def inputs(self) -> mx.array:
        """What the networks read, (B, T)."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> mx.array:
        """What follows it, (B, T)."""
        return self.tokens[:, 1:]


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
        InputError: If there is no such file, a row cannot be used, or there are no rows.
    """
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
        ended: Whether the text, or the last answer, came to its end.
        template_config: Further arguments of the chat template.
        prompts: Take a question without an answer.
        report: Counts answers that cannot be found in what the template writes.

    Raises:
        InputError: If the row cannot be used.
        Drop: If it holds nothing to learn.
    """
    known = read_row(row, place, prompts=prompts)
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
    said = list(tokenizer.encode(answer, add_special_tokens=False))
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
        start, content, stop = (
            tokens_before(tokenizer, written.text, place, tokens)
            for place in (answer.start, answer.content, answer.stop)
        )
        learned[start:stop] = True
        answers.append((answer.message, content, stop))
    if written.lost and report is not None:
        report.change("only the last answer learned, for the others were not found", source.place)
    return Text(tokens, learned.tolist(), replace(source, answers=tuple(answers)))


def limited(texts: Sequence[Text], count: int | None, report: Report) -> list[Text]:
    """Return the first ``count`` texts, or all; the others are counted as dropped."""
    for text in texts[count:] if count is not None else ():
        report.drop(f"behind the first {count}", text.place)
    return list(texts[:count])


def fit(
    texts: Sequence[Text],
    max_length: int,
    long: str = "cut",
    *,
    prompts: bool = False,
    report: Report | None = None,
) -> tuple[list[Text], Report]:
    """Return the texts that can be learned, none longer than ``max_length``, and what was done.

    Args:
        texts: All of them.
        max_length: In tokens.
        long: What happens to longer ones: "cut" keeps the beginning of documents and drops chats,
            whose template's marks would be lost, "drop" leaves all out, "refuse" stops.
        prompts: Keep those of which nothing is learned.
        report: Counts go there.

    Raises:
        InputError: If a text is too long and that was to be refused, or if nothing is left.
    """
    if long not in LONG:
        raise InputError(f"long must be one of {', '.join(LONG)}, got {long}")
    report = Report(rows=len(texts)) if report is None else report
    too_long = sum(len(text.tokens) > max_length for text in texts)
    if too_long and long == "refuse":
        raise InputError(
            f"{too_long} of {len(texts)} {report.noun} are longer than {max_length} tokens; "
            "cut or drop them with --long, or raise --max-length"
        )
    kept = []
    for text in texts:
        is_long = len(text.tokens) > max_length
        if is_long and (long == "drop" or (text.source and text.source.templated)):
            report.drop(f"longer than {max_length} tokens", text.place)
            continue
        fitting = text.upto(max_length) if is_long else text
        if not fitting.num_learned and not (prompts and not is_long):
            report.drop(f"nothing to learn within {max_length} tokens", text.place)
            continue
        if is_long:
            report.change(f"cut to {max_length} tokens", text.place)
        kept.append(fitting)
    report.kept = len(kept)
    if not kept:
        raise InputError(
            f"none of {len(texts)} {report.noun} has anything to learn: {report.reasons()}"
        )
    return kept, report


def pack(texts: Sequence[Text], length: int) -> list[Text]:
    """Return the texts end to end, cut into rows of ``length`` tokens; only the last is shorter.

    Nothing is padded, and a text sees the end of the one before it. All that was learned still is,
    and once: a row begins with the last token of the one before it. A row that would have nothing
    to learn is left out.
    """
    stream = Text(
        [token for text in texts for token in text.tokens],
        [mark for text in texts for mark in text.learned],
    )
    starts = range(0, len(stream.tokens), length - 1)
    parts = [slice(start, start + length) for start in starts]
    rows = [Text(stream.tokens[part], stream.learned[part]) for part in parts]
    return [row for row in rows if row.num_learned]


def held_out_rows(groups: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Return which ``count`` rows are held out, in order: the same share of every group.

    Args:
        groups: What each row belongs to: its file, or the temperature that it was written at.
        count: Number of rows to hold out.
        seed: Decides.
    """
    random = np.random.default_rng([seed, 5])
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    # Every group in a random order, spread over the same way; those that come first are taken.
    way = {}
    for rows in members.values():
        offset = random.random()
        for place, row in enumerate(random.permutation(rows).tolist()):
            way[row] = (place + offset) / len(rows)
    return sorted(sorted(way, key=way.__getitem__)[:count])


def split_held_out(texts: Sequence[Text], count: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Return the texts to learn and those held out, which come from every file.

    Raises:
        InputError: If there are too few.
    """
    if len(texts) <= count:
        raise InputError(f"{len(texts)} texts are too few: {count} are held out")
    files = [text.source.file if text.source else "" for text in texts]
    held = set(held_out_rows(files, count, seed))
    learn = [text for row, text in enumerate(texts) if row not in held]
    return learn, [texts[row] for row in sorted(held)]


def text_batch(
    texts: Sequence[Text], rows: Iterable[int], multiple: int = 32, limit: int | None = None
) -> TextBatch:
    """Return some of the texts as a batch, padded to a multiple of so many inputs.

    Args:
        texts: All of them.
        rows: Which ones.
        multiple: Of inputs, so that few shapes occur.
        limit: Positions that the networks have; nothing is padded beyond them.
    """
    rows = [int(row) for row in rows]
    longest = max(len(texts[row].tokens) for row in rows) - 1
    width = -(-longest // multiple) * multiple + 1
    width = width if limit is None else max(longest + 1, min(width, limit + 1))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width - 1), np.float32)
    for place, row in enumerate(rows):
        text = texts[row]
        tokens[place, : len(text.tokens)] = text.tokens
        mask[place, : len(text.tokens) - 1] = text.learned[1:]
    return TextBatch(mx.array(tokens), mx.array(mask), rows, [texts[row] for row in rows])


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """Return which rows a step's batch takes, as a function of the step, counted from 0.

    Every epoch is a new order. Texts of similar length come together, so little is padded: rows
    are shuffled, sorted by length within pools of sixteen batches, and the batches shuffled.
    """
    num_rows = len(lengths)
    per_epoch = -(-num_rows // batch_size)
    known: dict[int, list[list[int]]] = {}

    def rows(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in known:
            known.clear()
            known[epoch] = list(_epoch(lengths, batch_size, np.random.default_rng([seed, epoch])))
        return known[epoch][place]

    return rows


def _epoch(
    lengths: Sequence[int], batch_size: int, random: np.random.Generator
) -> Iterator[list[int]]:
    order = random.permutation(len(lengths))
    pool = 16 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        some = sorted(order[start : start + pool].tolist(), key=lambda row: lengths[row])
        batches += [some[at : at + batch_size] for at in range(0, len(some), batch_size)]
    for place in random.permutation(len(batches)):
        yield batches[place]
