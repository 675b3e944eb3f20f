r"""Chats as a tokenizer's template writes them, and which tokens of them are answers.

A template is a program: it may move, strip or think, so an answer is not found by its text. It is
found by writing the chat once more with a mark in the answer's place::

    whole    <user>Hi<end>\n<assistant>Hello!<end>\n
    marked   <user>Hi<end>\n<assistant>MARK<end>\n      what stands around MARK stands around Hello!

Learned is what a model writes itself: from behind the generation prompt to the first token that
ends the turn; what follows, such as a line's end, is the template's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_distill.data.tokens import shared
from mlx_distill.errors import InputError, one_line

MARK = "QZANSWERZQ"


@dataclass(frozen=True)
class Chat:
    """A chat as a row of data holds it.

    Args:
        messages: Of role and content.
        tools: Schemas of the tools that the answers may call, for the template.
        template_config: The row's own arguments of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    template_config: Mapping[str, Any] = field(default_factory=dict)

    def upto(self, count: int, *more: Mapping[str, Any]) -> "Chat":
        """Return the chat of the first messages and of more ones."""
        return Chat([*self.messages[:count], *more], self.tools, self.template_config)


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a written chat, in characters.

    Args:
        message: Which one it is.
        start: Where a model would begin to write it.
        content: Where its content begins; behind an empty thought, for example.
        end: Where its content ends.
        stop: Behind what ends the turn.
    """

    message: int
    start: int
    content: int
    end: int
    stop: int

    def within(self, start: int, stop: int) -> "Answer":
        """Return the answer from there on, and no longer."""
        stop = min(stop, self.stop)
        end = max(start, min(self.end, stop))
        return Answer(self.message, start, min(max(start, self.content), end), end, stop)


@dataclass(frozen=True)
class WrittenChat:
    """A chat as text.

    Args:
        text: The whole.
        answers: Those that were found in it.
        lost: Number of those that were not; they are read and not learned.
    """

    text: str
    answers: list[Answer]
    lost: int


def apply_template(
    tokenizer: Any, chat: Chat, template_config: Mapping[str, Any] | None, **options: Any
) -> Any:
    """Return what the tokenizer's chat template makes of a chat: token ids, or text.

    Args:
        tokenizer: An mlx-lm tokenizer.
        chat: What to write.
        template_config: Further arguments of the template; the chat's own ones win.
        options: As of ``apply_chat_template``.

    Raises:
        InputError: If the template fails.
    """
    tools = {"tools": list(chat.tools)} if chat.tools else {}
    given = {**tools, **(template_config or {}), **chat.template_config}
    try:
        return tokenizer.apply_chat_template(list(chat.messages), **{**given, **options})
    except Exception as error:  # a template is a program of the model's; it can raise anything
        _check_text(chat)
        raise InputError(f"the tokenizer's chat template failed: {one_line(error)}") from error


def _check_text(chat: Chat) -> None:
    """Raise InputError if a message holds half a character, which no tokenizer takes."""
    try:
        json.dumps(list(chat.messages), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a message is not text: {error.reason}") from None


def write_chat(
    tokenizer: Any,
    chat: Chat,
    template_config: Mapping[str, Any] | None = None,
    ended: bool = True,
) -> WrittenChat:
    """Return a chat as text, with the places of its answers.

    Args:
        tokenizer: An mlx-lm tokenizer with a chat template.
        chat: Ends with an answer.
        template_config: Further arguments of the template.
        ended: False if the last answer was cut off: then the text ends with it, and no end is
            learned.

    Raises:
        InputError: If the template fails or writes no text.
    """
    writer = _Writer(tokenizer, template_config)
    whole = writer.text(chat)
    last = len(chat.messages) - 1
    asked, opening = writer.asked(chat.upto(last))
    at_end = writer.around(chat, last, whole)
    closing = at_end[1] if at_end else ""  # what a template writes behind a last answer ends a turn
    answers, lost, done = [], 0, 0
    for place, message in enumerate(chat.messages):
        if message.get("role") != "assistant":
            continue
        around = at_end if place == last else writer.around(chat, place, whole)
        answer = _locate(place, whole, around, opening, closing, done) if around else None
        answer = writer.bounded(answer, chat, place, whole, closing)
        if answer is None and place == last:
            answer = _behind(asked, last, whole, closing)
        if answer is None:
            lost += 1
            continue
        answer = writer.trimmed(answer, whole, closing)
        done = answer.stop
        if message.get("weight") != 0:  # OpenAI's mark of an answer that is not to be learned
            answers.append(answer)
    if lost:
        lost += sum(answer.message != last for answer in answers)
        answers = [answer for answer in answers if answer.message == last]
    if not ended and answers and answers[-1].message == last:
        cut = answers[-1]
        whole = whole[: cut.end]
        answers[-1] = replace(cut, stop=cut.end)
    return WrittenChat(whole, answers, lost)


class _Writer:
    """Writes chats with one tokenizer."""

    def __init__(self, tokenizer: Any, template_config: Mapping[str, Any] | None):
        self.tokenizer = tokenizer
        self.template_config = template_config
        ids = sorted(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id} - {None})
        self.ends = [tokenizer.decode([token]) for token in ids]
        known = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.marks = [token.content for token in known if token.special]

    def text(self, chat: Chat, opened: bool = False) -> str:
        """Return a chat as text; ``opened`` for the next answer to be written."""
        text = apply_template(
            self.tokenizer,
            chat,
            self.template_config,
            tokenize=False,
            add_generation_prompt=opened,
        )
        if not isinstance(text, str):
            raise InputError(f"the chat template gives {type(text).__name__} and no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"not text: {error.reason} at {error.start}") from None
        return text

    def asked(self, chat: Chat) -> tuple[str, str]:
        """Return a chat whose next answer is to be written, and the mark that says so alone."""
        if not chat.messages:
            return "", ""
        try:
            asked, before = self.text(chat, True), self.text(chat)
        except InputError:  # the whole could be written: the template wants to see its last answer
            return "", ""
        return asked, asked[len(before) :] if asked.startswith(before) else ""

    def around(self, chat: Chat, place: int, whole: str) -> tuple[str, str] | None:
        """Return what stands before and behind a message's content; None if that is unclear."""
        mark = MARK
        while mark in whole:
            mark += "Q"
        marked = [*chat.messages]
        own = marked[place].get("role") == "assistant"
        marked[place] = {**({"role": "assistant"} if own else marked[place]), "content": mark}
        try:
            before, *behind = self.text(chat.upto(0, *marked)).split(mark)
        except InputError:  # a template may insist on what was taken away, such as a tool's call
            return None
        return (before, behind[0]) if len(behind) == 1 else None

    def bounded(
        self, answer: Answer | None, chat: Chat, place: int, whole: str, closing: str
    ) -> Answer | None:
        """Return an answer within what the template adds for it, where that is seen.

        Where the whole goes on from it, that is what stands behind the question, as a model is
        asked it, and before the next message, be it a tool's that is written into the same turn. So
        answers are found, too, that no mark can take the place of, such as calls.
        """
        asked, _ = self.asked(chat.upto(place))
        written = whole if place + 1 == len(chat.messages) else self.begun(chat, place + 1)
        start = len(asked) if asked and whole.startswith(asked) else None
        stop = len(written) if written and whole.startswith(written) else None
        if answer is None:
            if start is None or stop is None or start > stop:
                return None
            return _behind(asked, place, written, closing)
        start, most = answer.start if start is None else start, stop
        if most is None and self.told(chat, place + 1, whole, answer.stop):
            most = shared(whole, written)  # what was said behind the tool's word is not learned
        if most is None:
            most = answer.stop
        return answer.within(start, most) if start <= most else None

    def begun(self, chat: Chat, count: int) -> str:
        """Return the first messages of a chat as text; none if the template wants what follows."""
        try:
            return self.text(chat.upto(count))
        except InputError:
            return ""

    def told(self, chat: Chat, place: int, whole: str, stop: int) -> bool:
        """Return whether a message is the word of a tool, and is written before ``stop``."""
        if chat.messages[place:] and chat.messages[place].get("role") not in ("user", "assistant"):
            around = self.around(chat, place, whole)
            return around is not None and len(around[0]) < stop and whole.startswith(around[0])
        return False

    def trimmed(self, answer: Answer, whole: str, closing: str) -> Answer:
        """Return the answer without what the template writes behind the end of the turn."""
        behind = whole[answer.end : answer.stop]
        for kind in (self.ends, self.marks):
            found = [(behind.find(mark), len(mark)) for mark in kind if mark and mark in behind]
            if found:
                at, length = min(found)
                return replace(answer, stop=answer.end + at + length)
        for mark in self.ends:  # a turn may end with the mark that opens the next one
            if mark and whole.startswith(mark, answer.end):
                return replace(answer, stop=answer.end + len(mark))
        # A part of what ends the last turn is the beginning of some other mark, and ends none.
        return answer if behind == closing else replace(answer, stop=answer.end)


def _locate(
    place: int, whole: str, around: tuple[str, str], opening: str, closing: str, done: int
) -> Answer | None:
    """Return where an answer stands, given what stands around it in a marked copy of the text.

    It begins behind ``done``, where the answer before it has ended.
    """
    before, behind = around
    # Behind as much of the generation prompt as was written: it may open a thought that a written
    # answer has not, and a written answer may have an empty thought that it does not open.
    start = len(before)
    for length in range(len(opening), 0, -1):
        at = before.rfind(opening[:length], done)
        if at >= 0 and (at + length == len(before) or length == len(opening)):
            start = at + length
            break
    end = len(whole) - len(behind)
    if not (whole.startswith(before[:start]) and whole.endswith(behind) and start <= end):
        return None
    content = len(before) if whole.startswith(before) and len(before) <= end else start
    return Answer(place, start, content, end, end + shared(behind, closing))


def _behind(asked: str, place: int, whole: str, closing: str) -> Answer:
    """Return an answer that begins where the two part: what was asked, and what was written."""
    start = shared(whole, asked)
    end = len(whole) - len(closing) * whole.endswith(closing)
    return Answer(place, start, start, max(start, end), len(whole))
