"""Stored completions of a teacher, for distillation from text alone.

A JSONL file comes as mlx-lm trains on it, as OpenAI stores or batches it, or as Amazon Bedrock logs
or batches it; every row is recognised by itself and becomes a chat that ends with the answer:

    {"input": "Hi", "output": "Hello!", "score": 0.9}
        messages  user "Hi", assistant "Hello!"
        metadata  score 0.9

What is missing, failed or filtered is counted with its place, never skipped in silence. The layouts
are those of text: a row with images or tool calls is dropped.

Source:
    OpenAI, "API reference": chat completions, responses, batch; "Supervised fine-tuning".
    Amazon Bedrock, "User guide": model invocation logging, batch inference, model distillation.
"""

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_distill.data.records import read_jsonl
from mlx_distill.data.texts import Text, encode_row
from mlx_distill.errors import InputError, one_line

PLACES_SHOWN = 3
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
TRUNCATED = {"length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"}
REFUSED = {"refusal", "content_filter", "content_filtered", "guardrail_intervened"}

_UNKNOWN = "unknown layout"
_TEXT_PARTS = (None, "text", "input_text", "output_text", "refusal")
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")
_UNREAD_PARTS = ("reasoningContent", "cachePoint")
_BODIES = {
    *("messages", "prompt", "completion", "text", "system", "input", "output", "choices"),
    *("request", "response", "body", "modelInput", "modelOutput", "metadata", "requestMetadata"),
}


@dataclass(frozen=True)
class Completion:
    """One answer of a teacher with what it answers.

    Args:
        messages: A chat of role and content, both texts; the last message is the answer.
        text: A document without a question; one of the two is None.
        metadata: The model and whatever else the row says about the answer.
        finish_reason: Why the answer ended, in its source's own word; "refusal" where the source
            marks a refusal in another way.
        place: Where it stands, for complaints.
    """

    messages: list[dict[str, Any]] | None
    text: str | None
    metadata: dict[str, Any]
    finish_reason: str | None
    place: str

    @property
    def answer(self) -> str:
        """What is to be learned."""
        return self.messages[-1]["content"] if self.messages else self.text or ""


@dataclass(frozen=True)
class CompletionFilter:
    """Which stored completions are learned.

    Args:
        min_answer_chars: The shortest answer, in characters.
        max_answer_chars: The longest answer, in characters.
        drop_duplicates: Leave out what differs in white space alone from one that is kept.
        drop_refusals: Leave out answers that begin like a refusal or are marked as one.
        drop_truncated: Leave out answers that ended at their longest allowed length.
        where: A condition on the metadata, such as ``model == "x" and score >= 0.8``.
    """

    min_answer_chars: int = 1
    max_answer_chars: int | None = None
    drop_duplicates: bool = True
    drop_refusals: bool = True
    drop_truncated: bool = True
    where: str | None = None

    def __post_init__(self) -> None:
        if self.min_answer_chars < 1:
            raise InputError(f"min_answer_chars must be at least 1, got {self.min_answer_chars}")
        if self.max_answer_chars is not None and self.max_answer_chars < self.min_answer_chars:
            raise InputError(
                f"max_answer_chars must be at least min_answer_chars ({self.min_answer_chars}), "
                f"got {self.max_answer_chars}"
            )
        if self.where is not None:
            compile_where(self.where)


class Drop(Exception):
    """A row is not used; the text is the reason, the same for all rows of a kind."""


@dataclass
class Report:
    """What was read, kept and dropped.

    Args:
        rows: Lines of the file.
        kept: Completions; a row with several choices has several.
        dropped: Rows or choices that were not kept, by reason.
        places: Where the first of them stand, by reason.
    """

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def counting(self, place: str) -> Iterator[None]:
        """Count a Drop and end it here."""
        try:
            yield
        except Drop as drop:
            reason = str(drop)
            self.dropped[reason] += 1
            if self.dropped[reason] <= PLACES_SHOWN:
                self.places.setdefault(reason, []).append(place)

    def lines(self) -> list[str]:
        """Return the report as text, the most frequent reason first."""
        total = sum(self.dropped.values())
        return [
            f"{self.rows} rows read, {self.kept} completions kept, {total} dropped",
            *(
                f"{count} {reason}: {'; '.join(self.places[reason])}"
                + ("; ..." if count > PLACES_SHOWN else "")
                for reason, count in self.dropped.most_common()
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        dropped = {
            reason: {"count": count, "places": self.places[reason]}
            for reason, count in self.dropped.most_common()
        }
        return {"rows": self.rows, "kept": self.kept, "dropped": dropped}


def read_completions(path: str | Path, filter: CompletionFilter) -> tuple[list[Completion], Report]:
    """Return the completions of a JSONL file that pass the filter, and what became of its rows.

    Args:
        path: The file; every row may have a layout of its own.
        filter: What is kept.

    Raises:
        InputError: If the file cannot be read, a line is no JSON object, no row has a known
            layout, or nothing is left.
    """
    report = Report()
    check = _checker(filter)
    completions = []
    for place, row in read_jsonl(path):
        report.rows += 1
        with report.counting(place):
            for completion in _completions(row, place, report):
                with report.counting(completion.place):
                    check(completion)
                    completions.append(completion)
    report.kept = len(completions)
    if report.rows and report.dropped[_UNKNOWN] == report.rows:
        keys = sorted({key for _, row in read_jsonl(path) for key in row})
        raise InputError(
            f"{path} has no row of a known layout (mlx-lm, OpenAI, Amazon Bedrock); the keys are "
            f"{', '.join(keys[:20]) or 'none'}"
        )
    if not completions:
        counts = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
        raise InputError(f"{path} leaves no completions of {report.rows} rows: {counts or 'empty'}")
    return completions, report


def completion_texts(
    completions: Sequence[Completion], tokenizer: Any, learn_prompts: bool = False
) -> list[Text]:
    """Return the completions as token ids.

    Without a chat template a question and its answer are written as they are, behind the system's
    text and a blank line.

    Args:
        completions: From ``read_completions``.
        tokenizer: An mlx-lm tokenizer; its chat template writes the chats.
        learn_prompts: Also learn the prompts, not the answers alone.

    Raises:
        InputError: If a chat of several turns has no template to be written with, or it fails.
    """
    template = bool(getattr(tokenizer, "has_chat_template", False))
    return [
        encode_row(
            _mlx_lm_row(completion, template),
            tokenizer,
            completion.place,
            learn_prompts,
            ended=(completion.finish_reason or "").lower() not in TRUNCATED,
        )
        for completion in completions
    ]


def compile_where(where: str) -> Callable[[dict[str, Any]], bool]:
    """Return a condition on metadata as a function of them; nothing of Python's runs but this.

    It knows names (dotted ones look into nested objects), constants and lists of them, ``and``,
    ``or``, ``not``, comparisons, ``in`` and ``not in``. OpenAI and Bedrock store every value as a
    text: one that is compared with a number or a truth value is read as one, if it can be. The
    function raises Drop where a name is missing or two values cannot be compared.

    Raises:
        InputError: If the condition holds anything else.
    """
    try:
        tree = ast.parse(where.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"where is no condition: {one_line(error)}: {where}") from None
    value = _compile(tree)
    return lambda metadata: _truth(value(metadata))


# ------------------------------------------------------------------------------------- the filter


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
        if where is not None and not where(completion.metadata):
            raise Drop("where is false")
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
    return blake2b(json.dumps(squeezed).encode(), digest_size=16).digest()


# ------------------------------------------------------------------------------------- the layouts


def _completions(row: dict[str, Any], place: str, report: Report) -> Iterator[Completion]:
    """Yield the answers of a row; the report counts the choices that cannot be used."""
    request, response = _bodies(row)
    metadata = _metadata(row, request, response)
    if request is None:
        yield Completion(None, _answer(row["text"]), metadata, _ended(row), place)
        return
    question = _question(request)
    answers = _answers(response)
    for number, (message, ended) in enumerate(answers, start=1):
        name = place if len(answers) == 1 else f"{place}, choice {number}"
        with report.counting(name):
            chat = _answered(question, _answer(message))
            ended = "refusal" if _is_marked_refusal(message) else ended
            yield Completion(chat, None, metadata, ended, name)


def _bodies(row: dict[str, Any]) -> tuple[dict[str, Any] | None, Any]:
    """Return a row's request and response; a document has none."""
    if row.get("schemaType") == "ModelInvocationLog":
        _refuse_failed(row)
        request = _object(_object(row.get("input")).get("inputBodyJson"))
        return _unwritten(request), _object(row.get("output")).get("outputBodyJson")
    if "modelInput" in row:
        _refuse_failed(row)
        return _unwritten(_object(row["modelInput"])), row.get("modelOutput")
    if isinstance(row.get("response"), dict) or ("custom_id" in row and "response" in row):
        response = _object(row["response"])
        _refuse_failed({**response, **row})
        request = _object(row.get("request", row))
        return _object(request.get("body", request)), response.get("body", response)
    # With an instruction it is Alpaca's layout, in which the input is no question.
    is_pair = "input" in row and "output" in row and "instruction" not in row
    if is_pair or _objects(row.get("choices")):
        return row, row
    if "prompt" in row and "completion" in row:
        return row, {**row, "output": row["completion"]}
    if "messages" in row:
        return _split_chat(row)
    if "text" in row:
        return None, None
    raise Drop(_UNKNOWN)


def _refuse_failed(row: dict[str, Any]) -> None:
    if row.get("error") or row.get("errorCode") or row.get("status_code", 200) != 200:
        raise Drop("failed request")


def _unwritten(request: dict[str, Any]) -> dict[str, Any]:
    """Return a body that holds messages; others hold a text with a foreign template's marks."""
    if "messages" not in request and ("prompt" in request or "inputText" in request):
        raise Drop("prompt in a chat template's marks")
    return request


def _split_chat(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last message as the response to the others."""
    *asked, answer = _objects(row["messages"]) or [{}]
    if answer.get("role") != "assistant":
        raise Drop("no answer")
    if answer.get("weight") == 0:  # OpenAI's mark of an answer that is not to be learned
        raise Drop("weight 0")
    return {**row, "messages": asked}, {**row, "output": answer}


def _question(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a request, the system's first."""
    asked = request.get("messages", request.get("prompt", request.get("input")))
    if isinstance(asked, dict):
        return _question(asked)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    messages = [_message(message) for message in _objects(asked)]
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise Drop("no prompt")
    system = _content(request.get("system") or request.get("instructions"))
    return [{"role": "system", "content": system}, *messages] if system else messages


def _answers(response: Any) -> list[tuple[Any, str | None]]:
    """Return the answers of a response, as messages or their contents, and why they ended."""
    if isinstance(response, list):
        return [_joined(response)]
    response = _object(response)
    if choices := _objects(response.get("choices")):
        return [(choice.get("message", choice.get("text")), _ended(choice)) for choice in choices]
    output = response.get("output", response)
    if isinstance(output, dict):
        output = output.get("message", output)
    if isinstance(output, list):
        output = _said(output)
    return [(output, _ended(response))]


def _said(items: list[Any]) -> Any:
    """Return the message among the items of OpenAI's responses."""
    messages = [item for item in items if _object(item).get("type") not in _REASONING_PARTS]
    if any(_object(message).get("type", "message") != "message" for message in messages):
        raise Drop("not only text")
    return messages[-1] if messages else None


def _joined(events: list[Any]) -> tuple[Any, str | None]:
    """Return what Anthropic's events of a stream add up to, as Bedrock logs them."""
    deltas = [_object(_object(event).get("delta")) for event in events]
    if any(delta.get("type") == "input_json_delta" for delta in deltas):
        raise Drop("not only text")
    texts = [delta["text"] for delta in deltas if isinstance(delta.get("text"), str)]
    ends = [ended for delta in deltas if (ended := _ended(delta))]
    return "".join(texts), ends[-1] if ends else None


def _ended(body: dict[str, Any]) -> str | None:
    """Return why an answer ended, under whichever name."""
    incomplete = _object(body.get("incomplete_details")).get("reason")
    names = ("finish_reason", "stop_reason", "stopReason")
    given = (*(body.get(name) for name in names), incomplete)
    return next((reason for reason in given if isinstance(reason, str)), None)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as role and one text."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = _content(message)
    if role not in ("system", "user", "assistant"):
        raise Drop("not only text" if role in ("tool", "function") else "unknown role")
    return {"role": role, "content": content}


def _content(message: Any) -> str:
    """Return the text of a message, or of its content alone; reasoning is no part of it."""
    content = message
    if isinstance(message, dict):
        if message.get("tool_calls") or message.get("function_call"):
            raise Drop("not only text")
        if message.get("type") not in (None, "message"):
            raise Drop("not only text")
        content = message.get("content") or message.get("refusal")
    # Parts follow each other without a blank, as mlx-lm's server joins them.
    text = "".join(map(_part, content if isinstance(content, list) else [content]))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Drop("not Unicode") from None
    return text


def _part(part: Any) -> str:
    """Return the text of one part of a content."""
    if part is None or isinstance(part, str):
        return part or ""
    kind = _object(part).get("type")
    if kind in _REASONING_PARTS or any(name in _object(part) for name in _UNREAD_PARTS):
        return ""
    text = _object(part).get("refusal" if kind == "refusal" else "text")
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise Drop("not only text")
    return text


def _is_marked_refusal(message: Any) -> bool:
    message = _object(message)
    parts = _objects(message.get("content"))
    return bool(message.get("refusal")) or any(part.get("type") == "refusal" for part in parts)


def _answered(question: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """Return the chat; an answer that the request has begun goes on where that ends."""
    if question[-1]["role"] == "assistant":
        *question, begun = question
        answer = begun["content"] + answer
    return [*question, {"role": "assistant", "content": answer}]


def _metadata(row: dict[str, Any], request: Any, response: Any) -> dict[str, Any]:
    """Return what a row says beside its texts; what is closer to the answer wins."""
    bodies = (row, _object(request), _object(response))
    metadata = {name: value for name, value in row.items() if name not in _BODIES}
    for body in bodies:
        model = body.get("model", body.get("modelId"))
        metadata |= {} if model is None else {"model": model}
    for body in bodies:
        metadata |= _object(body.get("metadata")) | _object(body.get("requestMetadata"))
    return metadata


def _mlx_lm_row(completion: Completion, template: bool) -> dict[str, Any]:
    """Return a completion in mlx-lm's layout."""
    messages = completion.messages
    if messages is None:
        return {"text": completion.text}
    if template:
        return {"messages": messages}
    *systems, question, answer = messages
    if question["role"] != "user" or any(message["role"] != "system" for message in systems):
        raise InputError(
            f"{completion.place}: a chat of several turns needs a tokenizer with a chat template; "
            "this has none"
        )
    prompt = "\n\n".join(message["content"] for message in (*systems, question))
    return {"prompt": prompt, "completion": answer["content"]}


def _answer(message: Any) -> str:
    text = _content(message)
    if not text.strip():
        raise Drop("no answer")
    return text


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return a list of objects; anything else counts as an empty one."""
    is_objects = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return value if is_objects else []


# ----------------------------------------------------------------------------------- the condition

_Value = Callable[[dict[str, Any]], Any]
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    **{kind: lambda a, b, f=f: f(_like(a, b), _like(b, a)) for kind, f in _ORDER.items()},
    ast.In: lambda member, group: member in group,
    ast.NotIn: lambda member, group: member not in group,
}


def _compile(node: ast.expr) -> _Value:
    """Return an expression as a function of the metadata."""
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(value) for value in values]
            decide = all if isinstance(op, ast.And) else any
            return lambda metadata: decide(_truth(part(metadata)) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            denied = _compile(operand)
            return lambda metadata: not _truth(denied(metadata))
        case ast.Compare():
            return _comparison(node)
        case ast.Name() | ast.Attribute():
            names = _names(node)
            return lambda metadata: _look_up(metadata, names)
        case ast.Constant() | ast.List() | ast.Tuple() | ast.UnaryOp():
            try:
                constant = ast.literal_eval(node)
            except (ValueError, TypeError):
                raise _unknown(node) from None
            return lambda metadata: constant
    raise _unknown(node)


def _comparison(node: ast.Compare) -> _Value:
    for op in node.ops:
        if type(op) not in _COMPARE:
            raise _unknown(op, node)
    compares = [_COMPARE[type(op)] for op in node.ops]
    operands = [_compile(operand) for operand in (node.left, *node.comparators)]
    source = ast.unparse(node)

    def compare(metadata: dict[str, Any]) -> bool:
        values = [operand(metadata) for operand in operands]
        try:
            return all(f(a, b) for f, a, b in zip(compares, values, values[1:], strict=False))
        except TypeError:
            raise Drop(f"not comparable: {source}") from None

    return compare


def _names(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_names(node.value), node.attr]
    raise _unknown(node)


def _look_up(metadata: dict[str, Any], names: list[str]) -> Any:
    value: Any = metadata
    for name in names:
        if name not in _object(value):
            raise Drop(f"no such metadata: {'.'.join(names)}")
        value = value[name]
    return value


def _like(value: Any, other: Any) -> Any:
    """Return a text as the number or truth value that it spells, if the other one is such."""
    if isinstance(value, str) and isinstance(other, bool | int | float):
        try:
            spelt = json.loads(value.lower())
        except ValueError:
            return value
        return spelt if isinstance(spelt, bool | int | float) else value
    return value


def _truth(value: Any) -> bool:
    return bool(_like(value, True))


def _unknown(node: ast.AST, inside: ast.AST | None = None) -> InputError:
    return InputError(
        f"where cannot use {type(node).__name__} in {ast.unparse(inside or node)}; it takes names, "
        "constants, comparisons, in, and, or, not"
    )
