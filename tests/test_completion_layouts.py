"""Every layout that completions are stored in, and what of it cannot be used."""

from pathlib import Path
from typing import Any

import pytest
from completion_rows import (
    ALL,
    CHAT,
    HELLO,
    HI,
    KIND,
    KIND_CHAT,
    choice,
    log,
    parts,
    read,
    reasons,
    write,
)

from mlx_distill.data.completions import (
    read_completions,
)

ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "content": [{"type": "thinking", "thinking": "A greeting."}, *parts("Hel", "lo!", type="text")],
    "stop_reason": "end_turn",
}


ASKED = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 9,
    "system": "Be kind.",
    "messages": [HI],
}


CONVERSE_CHAT = [{"role": "user", "content": parts("Hi")}]


CONVERSE = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [{"reasoningContent": {"reasoningText": {"text": "Hm."}}}, *parts("Hello!")],
        }
    },
    "stopReason": "end_turn",
    "usage": {"inputTokens": 1},
}


STREAM = [
    {"type": "message_start", "message": {"role": "assistant", "content": []}},
    {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "A greeting."}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "lo!"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}},
    {"type": "message_stop"},
]


RESPONSES = {
    "object": "response",
    "model": "gpt-x",
    "status": "incomplete",
    "incomplete_details": {"reason": "max_output_tokens"},
    "output": [
        {"type": "reasoning", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": parts("Hello!", type="output_text", annotations=[]),
        },
    ],
}


LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str | None]] = {
    "mlx-lm prompt": ({"prompt": "Hi", "completion": "Hello!"}, CHAT, None),
    "mlx-lm chat": ({"messages": KIND_CHAT}, KIND_CHAT, None),
    "a chat of several turns": (
        {"messages": [KIND, HI, HELLO, HI, HELLO]},
        [KIND, *CHAT * 2],
        None,
    ),
    "a reason of our own": (
        {"prompt": "Hi", "completion": "Hello!", "finish_reason": "length"},
        CHAT,
        "length",
    ),
    "a chat with other keys": (
        {"messages": CHAT, "prompt": "p", "input": "i", "custom_id": "1"},
        CHAT,
        None,
    ),
    "prompts as messages": ({"prompt": [KIND, HI], "completion": [HELLO]}, KIND_CHAT, None),
    "OpenAI stored": (
        {"request": {"messages": [HI]}, "response": {"choices": [choice("Hello!")]}},
        CHAT,
        "stop",
    ),
    "OpenAI parts and developer": (
        {
            "request": {
                "messages": [
                    {"role": "developer", "content": "Be kind."},
                    {"role": "user", "content": parts("H", "i", type="text")},
                ]
            },
            "response": {"choices": [choice(parts("Hello!", type="text"), "length")]},
        },
        KIND_CHAT,
        "length",
    ),
    "OpenAI batch": (
        {
            "id": "batch_1",
            "custom_id": "1",
            "request": {"body": {"messages": [HI]}},
            "response": {"status_code": 200, "body": {"choices": [choice("Hello!")]}},
            "error": None,
        },
        CHAT,
        "stop",
    ),
    "OpenAI batch with its request's line": (
        {
            "custom_id": "1",
            "method": "POST",
            "body": {"messages": [HI]},
            "response": {"status_code": 200, "body": {"choices": [choice("Hello!")]}},
            "error": None,
        },
        CHAT,
        "stop",
    ),
    "OpenAI fine-tuning": (
        {"messages": [HI, {**HELLO, "weight": 1}], "parallel_tool_calls": False},
        CHAT,
        None,
    ),
    "OpenAI responses": (
        {"request": {"instructions": "Be kind.", "input": "Hi"}, "response": RESPONSES},
        KIND_CHAT,
        "max_output_tokens",
    ),
    "OpenAI responses, items": (
        {
            "input": [
                {"type": "message", "role": "user", "content": parts("Hi", type="input_text")}
            ],
            "output": RESPONSES["output"],
        },
        CHAT,
        None,
    ),
    "OpenAI text completion": (
        {
            "request": {"prompt": "Hi"},
            "response": {"choices": [{"text": "Hello!", "finish_reason": "stop"}]},
        },
        CHAT,
        "stop",
    ),
    "input and output": ({"input": "Hi", "output": "Hello!"}, CHAT, None),
    "messages and output": ({"input": [KIND, HI], "output": HELLO}, KIND_CHAT, None),
    "input in an object": ({"input": {"messages": [HI]}, "output": [HELLO]}, CHAT, None),
    "input and choices": ({"input": [HI], "choices": [choice("Hello!")]}, CHAT, "stop"),
    "messages and choices": ({"messages": [HI], "choices": [choice("Hello!")]}, CHAT, "stop"),
    "Bedrock log of Converse": (
        log({"messages": CONVERSE_CHAT, "system": parts("Be ", "kind.")}, CONVERSE),
        KIND_CHAT,
        "end_turn",
    ),
    "Bedrock log of Anthropic": (log(ASKED, ANTHROPIC), KIND_CHAT, "end_turn"),
    "Bedrock log of a stream": (log(ASKED, STREAM), KIND_CHAT, "end_turn"),
    "Bedrock log with a cache point": (
        log(
            {"messages": [{"role": "user", "content": [*parts("Hi"), {"cachePoint": {}}]}]},
            {**CONVERSE, "stopReason": "max_tokens"},
        ),
        CHAT,
        "max_tokens",
    ),
    "Bedrock log of a begun answer": (
        log({"messages": [HI, {"role": "assistant", "content": "Oh. "}]}, ANTHROPIC),
        [HI, {"role": "assistant", "content": "Oh. Hello!"}],
        "end_turn",
    ),
    "Bedrock fine-tuning": (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": parts("Be kind."),
            "messages": [*CONVERSE_CHAT, {"role": "assistant", "content": parts("Hello!")}],
        },
        KIND_CHAT,
        None,
    ),
    "Bedrock batch of Anthropic": (
        {"recordId": "1", "modelInput": ASKED, "modelOutput": ANTHROPIC},
        KIND_CHAT,
        "end_turn",
    ),
    "Bedrock batch of Nova": (
        {"recordId": "1", "modelInput": {"messages": CONVERSE_CHAT}, "modelOutput": CONVERSE},
        CHAT,
        "end_turn",
    ),
    "Bedrock batch of an OpenAI model": (
        {
            "recordId": "1",
            "modelInput": {"messages": [HI]},
            "modelOutput": {"choices": [choice("Hello!")]},
        },
        CHAT,
        "stop",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path: Path, name: str) -> None:
    row, messages, reason = LAYOUTS[name]
    (completion,) = read(tmp_path, row)
    assert completion.messages == messages
    assert completion.text is None
    assert completion.answer == messages[-1]["content"]
    assert completion.finish_reason == reason
    assert completion.place == f"{tmp_path / 'stored.jsonl'}, line 1"


def test_layouts_are_recognised_row_by_row(tmp_path: Path) -> None:
    completions = read(tmp_path, *(row for row, _, _ in LAYOUTS.values()))
    assert [one.messages for one in completions] == [chat for _, chat, _ in LAYOUTS.values()]
    assert [int(one.place.rsplit(" ", 1)[1]) for one in completions] == [
        *range(1, len(LAYOUTS) + 1)
    ]


def test_document(tmp_path: Path) -> None:
    (completion,) = read(tmp_path, {"text": "A story.", "source": "mine"})
    assert completion.messages is None
    assert completion.text == completion.answer == "A story."
    assert completion.metadata == {"source": "mine"}


def test_several_choices_are_several_completions(tmp_path: Path) -> None:
    tool = choice(None, tool_calls=[{"id": "1"}])
    choices = [choice("One"), tool, choice("Three", "length")]
    row = {"request": {"messages": [HI]}, "response": {"choices": choices}}
    completions, report = read_completions(write(tmp_path, row), ALL)
    assert [one.answer for one in completions] == ["One", "Three"]
    assert [one.finish_reason for one in completions] == ["stop", "length"]
    assert all(one.messages and one.messages[:-1] == [HI] for one in completions)
    assert [one.place.split(", ")[-1] for one in completions] == ["choice 1", "choice 3"]
    assert report.rows == 1
    assert report.kept == 2
    assert report.dropped == {"not only text": 1}
    assert report.places["not only text"][0].endswith("line 1, choice 2")


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


TOOL = {"role": "tool", "tool_call_id": "1", "content": "3"}


BATCH = {"custom_id": "1", "error": None}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Hi", "answer": "Hello!"}, "unknown layout"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no answer"),
        ({"input": "Hi", "choices": ["a", "b"]}, "unknown layout"),
        ({"input": "Hi", "response": "Hello!"}, "unknown layout"),
        (
            {**BATCH, "response": {"status_code": 200, "body": {"choices": [choice("Hello!")]}}},
            "answer of a batch without its request, which a row may hold as request",
        ),
        ({"object": "chat.completion", "choices": [choice("Hello!")]}, "no prompt"),
        ({"messages": [HELLO]}, "no prompt"),
        ({"messages": [KIND, HELLO]}, "no prompt"),
        ({"prompt": " ", "completion": "Hello!"}, "no prompt"),
        ({"prompt": None, "completion": "Hello!"}, "no prompt"),
        ({"prompt": ["Hi"], "completion": "Hello!"}, "no prompt"),
        (log(None, CONVERSE, inputBodyS3Path="s3://x"), "no prompt"),
        ({"prompt": "Hi", "completion": ""}, "no answer"),
        ({"prompt": "Hi", "completion": "\n"}, "no answer"),
        ({"prompt": "Hi", "completion": None}, "no answer"),
        ({"text": " "}, "no answer"),
        ({"messages": [HI]}, "no answer"),
        ({"messages": "Hi"}, "no answer"),
        ({"messages": []}, "no answer"),
        ({"input": "Hi", "output": []}, "no answer"),
        ({"request": {"messages": [HI]}, "response": {"choices": []}}, "no answer"),
        ({"recordId": "1", "modelInput": ASKED}, "no answer"),
        (log(ASKED, None), "no answer"),
        (log(ASKED, []), "no answer"),
        (
            {**BATCH, "body": {"messages": [HI]}, "response": {"status_code": 429, "body": {}}},
            "failed request",
        ),
        ({"custom_id": "1", "response": None, "error": {"code": "expired"}}, "failed request"),
        (
            {"recordId": "1", "modelInput": ASKED, "error": {"errorCode": 400}},
            "failed request",
        ),
        (log(ASKED, None, errorCode="ThrottlingException"), "failed request"),
        ({"messages": [IMAGE, HELLO]}, "not only text"),
        ({"messages": [HI, TOOL, HELLO]}, "not only text"),
        ({"messages": [HI, {**HELLO, "tool_calls": [{}]}]}, "not only text"),
        ({"messages": [HI, {**HELLO, "function_call": {"name": "x"}}]}, "not only text"),
        ({"input": "Hi", "output": [{"type": "function_call"}]}, "not only text"),
        (
            log({"messages": [{"role": "user", "content": [{"image": {}}]}]}, CONVERSE),
            "not only text",
        ),
        (log(ASKED, [{"delta": {"type": "input_json_delta"}}]), "not only text"),
        ({"text": 3}, "not only text"),
        ({"messages": [{"role": "robot", "content": "Hi"}, HELLO]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "Hi"}, HELLO]}, "unknown role"),
        ({"messages": [{"content": "Hi"}, HELLO]}, "unknown role"),
        ({"messages": [HI, {**HELLO, "weight": 0}]}, "weight 0"),
        ({"prompt": "Hi", "completion": "\ud800"}, "not Unicode"),
        (
            log({"prompt": "<|user|>Hi<|assistant|>"}, {"generation": "Hello!"}),
            "prompt in a chat template's marks",
        ),
        (
            {"modelInput": {"inputText": "User: Hi"}, "modelOutput": {"results": []}},
            "prompt in a chat template's marks",
        ),
    ],
)
def test_what_cannot_be_used_is_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    assert reasons(tmp_path, row) == {reason: 1}


def test_metadata(tmp_path: Path) -> None:
    stored = {
        "id": "chatcmpl-1",
        "metadata": {"split": "row", "tags": ["news"]},
        "request": {"model": "asked", "messages": [HI], "metadata": {"split": "request"}},
        "response": {"model": "answered", "choices": [choice("Hello!")], "metadata": {"x": "1"}},
    }
    bedrock = log(ASKED, ANTHROPIC, requestMetadata={"project": "a"})
    plain = {"prompt": "Hi", "completion": "Hello!", "score": 0.5, "metadata": None}
    first, second, third = (one.metadata for one in read(tmp_path, stored, bedrock, plain))
    assert first == {
        "id": "chatcmpl-1",
        "model": "answered",
        "split": "request",
        "tags": ["news"],
        "x": "1",
    }
    assert second["model"] == second["modelId"] == "amazon.nova-pro-v1:0"
    assert second["project"] == "a"
    assert not {"input", "output", "requestMetadata"} & set(second)
    assert third == {"score": 0.5}
