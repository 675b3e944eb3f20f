"""Stored completions: every layout, every filter, and what is said about the rest."""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mlx_distill import config
from mlx_distill.checkpoint import bundled
from mlx_distill.data.completion_layouts import Completion
from mlx_distill.data.completions import (
    CompletionFilter,
    completion_texts,
    is_refusal,
    read_completions,
)
from mlx_distill.data.condition import Undecided, compile_where
from mlx_distill.data.encoding import encode_row
from mlx_distill.data.report import Report
from mlx_distill.data.texts import Text
from mlx_distill.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
KIND = {"role": "system", "content": "Be kind."}
CHAT = [HI, HELLO]
KIND_CHAT = [KIND, HI, HELLO]
ALL = CompletionFilter(drop_duplicates=False, drop_refusals=False, drop_truncated=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(
        bundled("stories-14m"), tokenizer_config_extra={"chat_template": TEMPLATE}
    )


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "stored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, *rows: Any, filter: CompletionFilter = ALL) -> list[Completion]:
    return read_completions(write(folder, *rows), filter)[0]


def reasons(folder: Path, *rows: Any, filter: CompletionFilter = ALL) -> dict[str, int]:
    """Return why rows are dropped; one that is kept goes along, so that something is left."""
    kept = {"prompt": "Is this kept?", "completion": "Of course, it is always there."}
    completions, report = read_completions(write(folder, *rows, kept), filter)
    assert report.kept == len(completions)
    assert completions[-1].answer == kept["completion"]
    return dict(report.dropped)


def parts(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{**more, "text": text} for text in texts]


def choice(content: Any, reason: str = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"index": 0, "message": message, "finish_reason": reason}


def log(request: Any, response: Any, **more: Any) -> dict[str, Any]:
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "modelId": "amazon.nova-pro-v1:0",
        "input": {"inputContentType": "application/json", "inputBodyJson": request},
        "output": {"outputContentType": "application/json", "outputBodyJson": response},
        **more,
    }


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


# ------------------------------------------------------------------------------------- the layouts


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


# ------------------------------------------------------------------------------------- the filters


def pair(answer: str, prompt: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, **more}


def test_lengths(tmp_path: Path) -> None:
    rows = [pair("1234 "), pair("12345"), pair("123456"), pair("1234567")]
    filter = CompletionFilter(min_answer_chars=5, max_answer_chars=6)
    completions, report = read_completions(write(tmp_path, *rows), filter)
    assert [one.answer for one in completions] == ["12345", "123456"]
    assert report.dropped == {"answer too short": 1, "answer too long": 1}


def test_duplicates_are_equal_but_for_white_space(tmp_path: Path) -> None:
    rows = [
        pair("One  two\n"),
        {"messages": [{"role": "user", "content": " Hi "}, {**HELLO, "content": "One two"}]},
        pair("One two", "Ho"),
        pair("Onetwo"),
        pair("one two"),
        {"messages": [KIND, HI, {**HELLO, "content": "One two"}]},
        {"text": "One two"},
        {"text": "One\ttwo"},
    ]
    completions, report = read_completions(write(tmp_path, *rows), CompletionFilter())
    assert [one.place.split(" ")[-1] for one in completions] == ["1", "3", "4", "5", "6", "7"]
    assert report.dropped == {"duplicate": 2}
    assert len(read(tmp_path, *rows, filter=CompletionFilter(drop_duplicates=False))) == 8


def test_a_dropped_row_hides_no_twin(tmp_path: Path) -> None:
    rows = [pair("Hello!", score=0), pair("Hello!", score=1), pair("Hello!", score=1)]
    completions, report = read_completions(
        write(tmp_path, *rows), CompletionFilter(where="score > 0")
    )
    assert [one.place.split(" ")[-1] for one in completions] == ["2"]
    assert report.dropped == {"where is false": 1, "duplicate": 1}


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t do this.",
        "I am so sorry, I cannot do this.",
        "Sorry, but I won't.",
        "As an AI language model, I have no opinion.",
        "As a large language model I have no opinion.",
        "As an AI assistant, I have no opinion.",
        "As an AI, I have no opinion.",
        "  Unfortunately, I cannot assist with this request.",
        "I'm unable to help with this.",
        "I am not able to comply.",
        "i can not fulfill this request.",
        "I'm sorry, but as an AI I have none.",
    ],
)
def test_refusal(tmp_path: Path, answer: str) -> None:
    assert is_refusal(answer)
    row = pair(answer)
    assert reasons(tmp_path, row, filter=CompletionFilter()) == {"refusal": 1}
    assert reasons(tmp_path, row, filter=CompletionFilter(drop_refusals=False)) == {}


@pytest.mark.parametrize(
    "answer",
    [
        "Ben looked up. \"I'm sorry, but I can't come,\" he said.",
        "\u201cI\u2019m sorry, but I can\u2019t come,\u201d said Ben.",
        "I cannot help but smile.",
        "As an AI researcher, she knew.",
        "I'm sorry to hear that. Try this:",
        "The list is long. " * 12 + "I'm sorry, but I can't go on.",
    ],
)
def test_no_refusal(answer: str) -> None:
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Hi", "choices": [choice(None, refusal="No.")]},
        {"input": "Hi", "choices": [choice([{"type": "refusal", "refusal": "No."}])]},
        {"input": "Hi", "choices": [choice("No.", "content_filter")]},
        log(ASKED, {**CONVERSE, "stopReason": "guardrail_intervened"}),
    ],
)
def test_marked_refusal(tmp_path: Path, row: dict[str, Any]) -> None:
    assert reasons(tmp_path, row, filter=CompletionFilter()) == {"refusal": 1}
    assert reasons(tmp_path, row) == {}


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "max_output_tokens"])
def test_truncated(tmp_path: Path, reason: str) -> None:
    row = pair("Hello", finish_reason=reason)
    assert reasons(tmp_path, row, filter=CompletionFilter()) == {"truncated": 1}
    assert reasons(tmp_path, row, filter=CompletionFilter(drop_truncated=False)) == {}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="min_answer_chars must be at least 1, got 0"):
        CompletionFilter(min_answer_chars=0)
    with pytest.raises(InputError, match=r"max_answer_chars must be at least .* \(5\), got 4"):
        CompletionFilter(min_answer_chars=5, max_answer_chars=4)
    assert CompletionFilter(min_answer_chars=5, max_answer_chars=5).max_answer_chars == 5


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, CompletionFilter)
    assert config.from_flags(CompletionFilter, parser.parse_args([])) == CompletionFilter()
    flags = ["--min-answer-chars", "2", "--max-answer-chars", "9", "--where", "a == 1"]
    flags += ["--no-drop-duplicates", "--no-drop-refusals", "--no-drop-truncated"]
    chosen = config.from_flags(CompletionFilter, parser.parse_args(flags))
    assert chosen == CompletionFilter(2, 9, False, False, False, "a == 1")
    text = parser.format_help()
    assert all(line in " ".join(text.split()) for line in ("differs in white space", "model =="))


# ----------------------------------------------------------------------------------- the condition

METADATA = {
    "model": "x",
    "score": 0.8,
    "flagged": False,
    "tags": ["news", "en"],
    "user": {"plan": {"name": "pro"}, "age": 7},
    "nothing": None,
    "stored": {"score": "0.9", "flagged": "false", "version": "4"},
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('model == "x" and score >= 0.8 and not flagged', True),
        ('model == "x" and score > 0.8', False),
        ('model != "x" or score < 1', True),
        ('"news" in tags', True),
        ('"sport" in tags', False),
        ('"sport" not in tags', True),
        ('model in ["x", "y"]', True),
        ('model in ("y", "z")', False),
        ('"a" in "abc"', True),
        ("0.5 < score <= 0.8", True),
        ("0.5 < score < 0.8", False),
        ("score > -1", True),
        ('user.plan.name == "pro"', True),
        ("user.age == 7", True),
        ('"plan" in user', True),
        ("nothing == None", True),
        ("flagged", False),
        ("not (flagged or nothing)", True),
        ("True", True),
        (" model == 'x'\n", True),
        ("stored.score >= 0.9", True),
        ("0.95 > stored.score > 0.85", True),
        ("not stored.flagged", True),
        ("stored.flagged == False", True),
        ("stored.version == 4", True),
        ('stored.version == "4"', True),
        ('stored.version == "4.0"', False),
        ("model == 1", False),
        ("score > 1 and missing", False),
        ("score < 1 or missing", True),
    ],
)
def test_where(where: str, expected: bool) -> None:
    assert compile_where(where)(METADATA) is expected


@pytest.mark.parametrize(
    ("where", "construct"),
    [
        ("len(tags) > 1", r"Call in len\(tags\)"),
        ("__import__('os').system('true')", "Call in __import__"),
        ("tags[0] == 'news'", "Subscript in tags"),
        ("score + 1 > 1", r"BinOp in score \+ 1"),
        ("score is None", "Is in score is None"),
        ("score if flagged else 1", "IfExp"),
        ("lambda: 1", "Lambda"),
        ("(lambda: 1).x", "Lambda"),
        ("'a'.upper == 1", "Constant in 'a'"),
        ("(score := 1)", "NamedExpr"),
        ("[x for x in tags]", "ListComp"),
        ("[model] == tags", "List in"),
        ("-score < 1", "UnaryOp in -score"),
        ("{1: 2} == user", "Dict"),
        ("f'{model}' == 'x'", "JoinedStr"),
        ("True or len(tags)", "Call"),
    ],
)
def test_where_knows_no_more(where: str, construct: str) -> None:
    """It is refused when the filter is made, before there is a row."""
    with pytest.raises(InputError, match=f"where cannot use {construct}.*it takes names"):
        CompletionFilter(where=where)


@pytest.mark.parametrize("where", ["", "score >", "a = 1", "a; b", "\0", "(" * 5000])
def test_where_is_an_expression(where: str) -> None:
    with pytest.raises(InputError, match="where is no condition"):
        CompletionFilter(where=where)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("missing == 1", "no such metadata: missing"),
        ("user.name == 1", "no such metadata: user.name"),
        ("score.real == 0.8", "no such metadata: score.real"),
        ("score.__class__", "no such metadata: score.__class__"),
        ("print", "no such metadata: print"),
        ("score > 'a'", "not comparable: score > 'a'"),
        ("nothing < 1", "not comparable: nothing < 1"),
        ("'a' in score", "not comparable: 'a' in score"),
        ("model < 1", "not comparable: model < 1"),
    ],
)
def test_where_drops_what_it_cannot_decide(where: str, reason: str) -> None:
    with pytest.raises(Undecided) as undecided:
        compile_where(where)(METADATA)
    assert str(undecided.value) == reason


def test_where_chooses_rows(tmp_path: Path) -> None:
    rows = [pair("One", score=0.9), pair("Two", score=0.1), pair("Three"), pair("Four", score="1")]
    filter = CompletionFilter(where="score >= 0.8")
    completions, report = read_completions(write(tmp_path, *rows), filter)
    assert [one.answer for one in completions] == ["One", "Four"]
    assert report.dropped == {"where is false": 1, "no such metadata: score": 1}


# -------------------------------------------------------------------------------------- the report


def test_report(tmp_path: Path) -> None:
    rows = [pair("Hello!"), {"a": 1}, *[pair("")] * 4, *[pair("Hello!")] * 3]
    _, report = read_completions(write(tmp_path, *rows), CompletionFilter())
    place = f"{tmp_path / 'stored.jsonl'}, line "
    assert report.lines() == [
        "9 rows read, 1 texts kept, 8 dropped",
        f"4 no answer: {place}3; {place}4; {place}5; ...",
        f"3 duplicate: {place}7; {place}8; {place}9",
        f"1 unknown layout: {place}2",
    ]
    assert json.loads(json.dumps(report.to_dict())) == {
        "rows": 9,
        "kept": 1,
        "dropped": {
            "no answer": {"count": 4, "places": [f"{place}{line}" for line in (3, 4, 5)]},
            "duplicate": {"count": 3, "places": [f"{place}{line}" for line in (7, 8, 9)]},
            "unknown layout": {"count": 1, "places": [f"{place}2"]},
        },
        "changed": {},
    }


def test_empty_report() -> None:
    assert Report().lines() == ["0 rows read, 0 texts kept, 0 dropped"]


def test_malformed_line(tmp_path: Path) -> None:
    path = write(tmp_path, pair("Hello!"))
    path.write_text(path.read_text() + "\n{oops\n")
    with pytest.raises(InputError, match=r"stored.jsonl, line 3: not JSON: .* at column 2"):
        read_completions(path, ALL)
    with pytest.raises(InputError, match="cannot be read"):
        read_completions(tmp_path / "none.jsonl", ALL)


def test_no_known_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row of a known layout.* the keys are a, b, c$"):
        read(tmp_path, {"b": 1, "a": 2}, {"c": 3})


def test_nothing_left(tmp_path: Path) -> None:
    rows = [pair("No", finish_reason="length"), pair(""), pair(""), {"a": 1}]
    expected = "leaves no completions of 4 rows: 2 no answer, 1 truncated, 1 unknown layout"
    with pytest.raises(InputError, match=expected):
        read(tmp_path, *rows, filter=CompletionFilter())
    with pytest.raises(InputError, match="leaves no completions of 0 rows: empty"):
        read(tmp_path)


# --------------------------------------------------------------------------------------- the texts


def test_texts_without_a_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair("there was a dog.", "Once upon a time"), {"text": "A story."}]
    completions = read(tmp_path, *rows)
    for learn_prompts in (False, True):
        texts = completion_texts(completions, tokenizer, learn_prompts)
        assert texts == [encode_row(row, tokenizer, "here", learn_prompts) for row in rows]
    assert completion_texts(completions, tokenizer)[0].learned.index(True) == len(
        tokenizer.encode("Once upon a time")
    )


@pytest.mark.parametrize(("reason", "ends"), [("stop", True), ("length", False), ("LENGTH", False)])
def test_what_was_cut_off_is_learned_without_an_end(
    tmp_path: Path, tokenizer: Any, reason: str, ends: bool
) -> None:
    row = {
        "request": {"messages": [HI]},
        "response": {"choices": [{"message": HELLO, "finish_reason": reason}]},
    }
    (text,) = completion_texts(read(tmp_path, row), tokenizer)
    assert (text.tokens[-1] == tokenizer.eos_token_id) == ends


def test_system_text_goes_in_front(tmp_path: Path, tokenizer: Any) -> None:
    (text,) = completion_texts(read(tmp_path, {"messages": KIND_CHAT}), tokenizer)
    assert text == encode_row(pair("Hello!", "Be kind.\n\nHi"), tokenizer, "here", False)


@pytest.mark.parametrize("chat", [[*CHAT, HI, HELLO], [HI, KIND, HELLO], [HI, KIND, HI, HELLO]])
def test_longer_chat_needs_a_template(
    tmp_path: Path, tokenizer: Any, chat: list[dict[str, Any]]
) -> None:
    completions = read(tmp_path, pair("Hello!"), {"messages": chat})
    with pytest.raises(InputError, match=r"line 2: a chat of several turns needs .* template"):
        completion_texts(completions, tokenizer)


def test_texts_with_a_template(tmp_path: Path, chat_tokenizer: Any) -> None:
    long = [KIND, HI, HELLO, HI, HELLO]
    rows = [pair("Hello!"), {"messages": long}, {"text": "A story."}]
    texts = completion_texts(read(tmp_path, *rows), chat_tokenizer)
    whole = chat_tokenizer.apply_chat_template(long)
    assert texts[1].tokens == whole
    for place, (start, _) in zip((2, 4), texts[1].answers(), strict=True):
        asked = chat_tokenizer.apply_chat_template(long[:place], add_generation_prompt=True)
        assert start == len(asked) < len(whole)
    assert texts == [encode_row(row, chat_tokenizer, "here", False) for row in rows]
    learned = completion_texts(read(tmp_path, *rows), chat_tokenizer, learn_prompts=True)
    assert [text.tokens for text in learned] == [text.tokens for text in texts]
    assert all(text == Text(text.tokens) for text in learned)
