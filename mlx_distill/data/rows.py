"""The layouts of rows that are learned from: mlx-lm's, Alpaca's and ShareGPT's.

    {"text": "A dog ran."}                                        a document
    {"prompt": "Hi", "completion": "Hello!"}                      a question and its answer
    {"messages": [...], "tools": [...]}                           a chat
    {"instruction": "Add.", "input": "1 2", "output": "3"}        Alpaca: a question and its answer
    {"conversations": [{"from": "human", "value": "Hi"}, ...]}    ShareGPT: a chat
    {"prompt": "Hi"}  {"turns": ["Hi"]}                           a question alone

A prompt and its completion may be lists of messages, too, as TRL writes them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.chats import Chat
from mlx_distill.data.report import Drop
from mlx_distill.errors import InputError

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
# Why an answer was cut off, in lower case: OpenAI's words, Anthropic's and Bedrock's.
TRUNCATED = {"length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"}
# What rows of Alpaca's layout hold, and what tables hold beside it of the same in other words.
ALPACA = {"instruction", "input", "output", "system", "history"}
ALPACA |= {"text", "prompt", "completion", "messages"}
EXPECTED = "expected text, prompt and completion, or messages"
EXPECTED_PROMPT = "expected a key prompt, messages, turns or text"


@dataclass(frozen=True)
class Row:
    """What a row holds: a document or a chat.

    Args:
        document: A text to go on with.
        chat: Otherwise; a question and its answer are one of two messages.
        pair: The chat was one question in the row, so it can be written without a template.
    """

    document: str | None = None
    chat: Chat = field(default_factory=lambda: Chat(()))
    pair: bool = False

    @property
    def answered(self) -> bool:
        """Whether the last message is an answer."""
        return bool(self.chat.messages) and self.chat.messages[-1].get("role") == "assistant"

    @property
    def question(self) -> str | None:
        """The question of a pair."""
        return self.chat.messages[0]["content"] if self.pair else None


def read_row(
    row: Mapping[str, Any], place: str, *, answers: bool = True, prompts: bool = False
) -> Row:
    """Return what a row holds.

    Args:
        row: As it stands in the file.
        place: Where, for complaints.
        answers: Whether the completion to a prompt is wanted.
        prompts: Whether a question alone will do.

    Raises:
        InputError: If it has no known layout, or values of other types.
        Drop: If a layout that is not mlx-lm's holds no answer, or an empty message.
    """
    row = as_mlx_lm(row, place, prompts)
    has_answer = answers and "completion" in row
    # Some tables hold a chat's first question beside it: the chat has the answers, too.
    alone = prompts and not (answers and row.get("messages"))
    if "prompt" in row and (has_answer or alone):
        return _pair(row, place, has_answer)
    if "messages" in row:
        return Row(chat=_chat(row, row["messages"], place, answers))
    turns = row.get("turns")
    if prompts and isinstance(turns, list) and turns:
        return Row(chat=_own(row, _asked(string(turns[0], place)), place), pair=True)
    if "text" in row:
        return Row(document=string(row["text"], place))
    expected = EXPECTED if answers else EXPECTED_PROMPT
    raise InputError(f"{place}: {expected}, got {sorted(row)!s:.200}")


def as_mlx_lm(row: Mapping[str, Any], place: str, prompts: bool = False) -> Mapping[str, Any]:
    """Return a row of Alpaca's or ShareGPT's layout in mlx-lm's; others as they are."""
    system = row.get("system")
    systems = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    if "instruction" in row and "output" in row:
        asked = [row["instruction"], row.get("input") or ""]
        question = "\n\n".join(string(text, place) for text in asked if text != "")
        rest = {name: value for name, value in row.items() if name not in ALPACA}
        before = [*systems, *_history(row.get("history"), place)]
        answer = [] if row["output"] in ("", None) else [_said(row["output"])]
        if not (answer or prompts):
            raise Drop("no answer")
        if before:
            return {**rest, "messages": [*before, *_asked(question).messages, *answer]}
        return {**rest, "prompt": question, **({"completion": row["output"]} if answer else {})}
    if isinstance(row.get("conversations"), list) and "messages" not in row:
        messages = [_sharegpt(message, place) for message in row["conversations"]]
        while messages and messages[-1]["role"] != "assistant" and not prompts:
            messages.pop()  # a question that nobody answered
        if not messages:
            raise Drop("no answer")
        return {**row, "messages": [*systems, *messages]}
    return row


def why_ended(row: Mapping[str, Any]) -> str | None:
    """Return why an answer ended, under whichever name a row or a response has it."""
    details = row.get("incomplete_details")
    incomplete = details.get("reason") if isinstance(details, dict) else None
    names = ("finish_reason", "stop_reason", "stopReason")
    given = (*(row.get(name) for name in names), incomplete)
    return next((reason for reason in given if isinstance(reason, str)), None)


def _history(turns: Any, place: str) -> list[Mapping[str, Any]]:
    """Return the messages of the turns before a question, pairs of a question and its answer."""
    turns = turns or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        raise InputError(f"{place}: history must be a list of pairs, got {turns!r:.40}")
    return [
        message
        for asked, said in turns
        for message in (*_asked(string(asked, place)).messages, _said(string(said, place)))
    ]


def _sharegpt(message: Any, place: str) -> dict[str, Any]:
    """Return a message of ShareGPT's layout in mlx-lm's."""
    if not isinstance(message, dict):
        raise InputError(f"{place}: conversations must be a list of from and value")
    if "role" in message and "content" in message:  # some files mix the two
        return message
    role, value = message.get("from"), message.get("value")
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        raise InputError(
            f"{place}: from must be one of {', '.join(SHAREGPT_ROLES)}, got {role!r:.40}"
        )
    if value == "":
        raise Drop("an empty message")
    return {"role": SHAREGPT_ROLES[role], "content": string(value, place)}


def _pair(row: Mapping[str, Any], place: str, has_answer: bool) -> Row:
    """Return a question with or without its answer; both may be messages."""
    prompt, answer = row["prompt"], row.get("completion")
    if isinstance(prompt, list):
        more = answer if isinstance(answer, list) else [_said(answer)]
        return Row(chat=_chat(row, [*prompt, *(more if has_answer else [])], place))
    asked = _asked(string(prompt, place, "" if has_answer else "the prompt is "))
    if not has_answer:
        return Row(chat=_own(row, asked, place), pair=True)
    chat = Chat([*asked.messages, _said(string(answer, place))])
    return Row(chat=_own(row, chat, place), pair=True)


def _asked(question: str) -> Chat:
    return Chat([{"role": "user", "content": question}])


def _said(answer: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer}


def _chat(row: Mapping[str, Any], messages: Any, place: str, answers: bool = True) -> Chat:
    if not answers and isinstance(messages, list) and messages:
        *before, last = messages
        is_answer = isinstance(last, dict) and last.get("role") == "assistant"
        messages = before if is_answer else messages
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(f"{place}: messages must be a list of role and content")
    for weight in (message.get("weight", 1) for message in messages):
        if weight not in (0, 1, None):
            raise InputError(f"{place}: the weight of a message must be 0 or 1, got {weight!r}")
    return _own(row, Chat([*map(_without_nulls, messages)]), place)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without fields that hold nothing, as services and tables write them.

    A template may ask whether a message has tool calls by whether the field is there.
    """
    return {key: value for key, value in message.items() if key == "content" or value is not None}


def _own(row: Mapping[str, Any], chat: Chat, place: str) -> Chat:
    """Return a chat with what its row says of tools and the template's arguments."""
    tools, config = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):  # tables that have no nested columns hold them as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{place}: tools are not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{place}: tools must be a list, got {type(tools).__name__}")
    if not isinstance(config, dict):
        raise InputError(f"{place}: chat_template_kwargs must be an object")
    return Chat(chat.messages, tools or None, config)


def _is_message(value: Any) -> bool:
    """Return whether a template can write it; some would write a missing content as "None"."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and (value.get("content") is not None or bool(value.get("tool_calls")))
    )


def string(value: Any, place: str, subject: str = "") -> str:
    """Return a value that must be a text with something in it; ``subject`` begins a complaint.

    Raises:
        InputError: If it is none.
    """
    if not isinstance(value, str) or not value:
        raise InputError(f"{place}: expected a non-empty text, got {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: {subject}not text: {error.reason} at {error.start}") from None
    return value
