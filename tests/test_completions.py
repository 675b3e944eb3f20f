"""Stored completions: every layout, every filter, and what is said about the rest."""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from completion_rows import ALL, CHAT, HELLO, HI, KIND, KIND_CHAT, choice, log, read, reasons, write
from test_completion_layouts import ASKED, CONVERSE

from mlx_distill import config
from mlx_distill.checkpoint import bundled
from mlx_distill.data.completions import (
    CompletionFilter,
    completion_texts,
    is_refusal,
    read_completions,
)
from mlx_distill.data.encoding import encode_row
from mlx_distill.data.report import Report
from mlx_distill.data.texts import Text
from mlx_distill.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(
        bundled("stories-14m"), tokenizer_config_extra={"chat_template": TEMPLATE}
    )


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


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rows_of_alpacas_layout_keep_what_stands_beside(tmp_path: Path, system: str | None) -> None:
    """How an answer ended, and metadata for a condition."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is ...", "score": 4}
    row = row if system is None else {**row, "system": system}
    assert reasons(tmp_path, {**row, "finish_reason": "length"}, filter=CompletionFilter()) == {
        "truncated": 1
    }
    rows = [row, {**row, "output": "4", "score": 2}]
    (kept,), report = read_completions(write(tmp_path, *rows), CompletionFilter(where="score > 3"))
    assert kept.metadata["score"] == 4
    assert report.dropped == {"where is false": 1}


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
