"""The layouts of stored completions: mlx-lm's, OpenAI's and Amazon Bedrock's, row by row.

Every row is recognised by itself and becomes a chat that ends with the answer. The layouts are
those of text: a row with images or tool calls is dropped.

Source:
    OpenAI, "API reference": chat completions, responses, batch; "Supervised fine-tuning".
    Amazon Bedrock, "User guide": model invocation logging, batch inference, model distillation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.report import Drop, Report
from mlx_distill.data.rows import as_mlx_lm, why_ended
from mlx_distill.data.texts import CHOICE

UNKNOWN = "unknown layout"
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
        template: What the chat's template is given beside its messages, as rows of mlx-lm's kind
            name it: tools that the answer might have called, chat_template_kwargs.
    """

    messages: list[dict[str, Any]] | None
    text: str | None
    metadata: dict[str, Any]
    finish_reason: str | None
    place: str
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """What is to be learned."""
        return self.messages[-1]["content"] if self.messages else self.text or ""


def row_completions(row: dict[str, Any], place: str, report: Report) -> Iterator[Completion]:
    """Yield the answers of a row; the report counts the choices that cannot be used."""
    row = dict(as_mlx_lm(row, place))
    request, response = _bodies(row)
    metadata = _metadata(row, request, response)
    if request is None:
        yield Completion(None, _answer(row["text"]), metadata, why_ended(row), place)
        return
    question, template = _question(request), _template(request)
    answers = _answers(response)
    for number, (message, ended) in enumerate(answers, start=1):
        name = place if len(answers) == 1 else f"{place}{CHOICE}{number}"
        with report.counting(name):
            chat = _answered(question, _answer(message))
            ended = "refusal" if _is_marked_refusal(message) else ended
            yield Completion(chat, None, metadata, ended, name, template)


def _template(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a request gives the template; tools in OpenAI's form, which templates know."""
    tools, config = _objects(request.get("tools")), _object(request.get("chat_template_kwargs"))
    known = bool(tools) and all(isinstance(tool.get("function"), dict) for tool in tools)
    return {
        **({"tools": tools} if known else {}),
        **({"chat_template_kwargs": config} if config else {}),
    }


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
        if not row.keys() & {"request", "body", "messages"}:
            raise Drop("answer of a batch without its request, which a row may hold as request")
        request = _object(row.get("request", row))
        return _object(request.get("body", request)), response.get("body", response)
    if ("input" in row and "output" in row) or _objects(row.get("choices")):
        return row, row
    if "prompt" in row and "completion" in row:
        return row, {**row, "output": row["completion"]}
    if "messages" in row:
        return _split_chat(row)
    if "text" in row:
        return None, None
    raise Drop(UNKNOWN)


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
        return [
            (choice.get("message", choice.get("text")), why_ended(choice)) for choice in choices
        ]
    output = response.get("output", response)
    if isinstance(output, dict):
        output = output.get("message", output)
    if isinstance(output, list):
        output = _said(output)
    return [(output, why_ended(response))]


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
    ends = [ended for delta in deltas if (ended := why_ended(delta))]
    return "".join(texts), ends[-1] if ends else None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as role and one text."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = _content(message)
    if role not in ("system", "user", "assistant"):
        raise Drop("not only text" if role in ("tool", "function") else "unknown role")
    known = {"role": role, "content": content}
    return {**known, "weight": 0} if message.get("weight") == 0 else known


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
