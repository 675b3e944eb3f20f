"""What is learned of a chat: every answer and its end, in whichever template."""

import copy
import json
from pathlib import Path
from typing import Any

import chat_templates as templates
import mlx_lm
import pytest
from transformers import AddedToken, AutoTokenizer

from mlx_distill.checkpoint import bundled
from mlx_distill.data.completions import CompletionFilter, completion_texts, read_completions
from mlx_distill.data.encoding import encode_row, read_texts
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.data.report import Report
from mlx_distill.data.selection import fit, pack
from mlx_distill.data.texts import Text
from mlx_distill.distillation.on_policy import with_room
from mlx_distill.errors import InputError

USER, OTHER = ({"role": "user", "content": text} for text in ("Hi", "And now?"))
FIRST, SECOND = ({"role": "assistant", "content": text} for text in ("Hello, Lily!", "We play."))
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [USER, FIRST, OTHER, SECOND]


@pytest.fixture(scope="module")
def stories() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(bundled("stories-14m"))
    marks = [AddedToken(mark, special=True, normalized=False) for mark in templates.MARKS]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def with_template(tokenizer: Any, template: str) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    ends = {own.convert_tokens_to_ids(mark) for mark in templates.ENDS if mark in template}
    return mlx_lm.tokenizer_utils.TokenizerWrapper(own, eos_token_ids=ends)


def said(tokenizer: Any, text: Text) -> list[str]:
    """Return what is learned, answer by answer."""
    return [tokenizer.decode(text.tokens[start:stop]) for start, stop in text.answers()]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (templates.CHATML, "<|im_end|>"),
        (templates.LLAMA3, "<|eot_id|>"),
        (templates.GEMMA, "<end_of_turn>"),
        (templates.MISTRAL, "</s>"),
    ],
)
def test_every_answer_is_learned_with_its_end(stories: Any, template: str, end: str) -> None:
    tokenizer = with_template(stories, template)
    text = encode_row({"messages": CHAT}, tokenizer, "here")
    assert text.tokens == tokenizer.apply_chat_template(CHAT)
    learned = [answer.strip() for answer in said(tokenizer, text)]
    assert learned == [f"Hello, Lily!{end}", f"We play.{end}"]
    for (start, _), place in zip(text.answers(), (1, 3), strict=True):
        asked = encode_prompt(tokenizer, CHAT[:place])
        assert text.tokens[:start] == asked  # just what a model is asked with
    assert sum(token == tokenizer.bos_token_id for token in text.tokens) <= 1


def test_answers_are_found_where_the_template_moves_the_system(stories: Any) -> None:
    """In front of the second question, though the first one alone would have it."""
    tokenizer = with_template(stories, templates.MISTRAL)
    report = Report()
    text = encode_row({"messages": [SYSTEM, *CHAT]}, tokenizer, "here", report=report)
    assert [one.strip() for one in said(tokenizer, text)] == ["Hello, Lily!</s>", "We play.</s>"]
    assert not report.changed


def called(name: str, **fields: Any) -> dict[str, Any]:
    """Return an answer that calls a tool."""
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


def told(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def test_answer_begins_behind_the_one_before_it(stories: Any) -> None:
    """Not where a thought was opened last: this answer has none, and two before it has."""
    tokenizer = with_template(stories, templates.THINKING)
    calls = [called("look", reasoning_content="Hm."), told("a cat")]
    more = [called("pet", content="Next: "), told("purr")]
    chat = [USER, *calls, *more, {**SECOND, "reasoning_content": "So."}]
    text = encode_row({"messages": chat}, tokenizer, "here")
    assert said(tokenizer, text) == [
        "Hm.\n</think>\n\n(look)<|im_end|>",
        "Next: (pet)<|im_end|>",
        "So.\n</think>\n\nWe play.<|im_end|>",
    ]
    for (start, _), place in zip(text.answers()[::2], (1, 5), strict=True):
        assert text.tokens[:start] == encode_prompt(tokenizer, chat[:place])


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (templates.SAME_TURN, ["(look)", "(pet)", "We play.<end_of_turn>"]),
        (templates.STRICT, ["(look)</s>", "(pet)</s>", "We play.</s>"]),
    ],
)
def test_what_a_tool_says_is_never_learned(stories: Any, template: str, answers: list[str]) -> None:
    tokenizer = with_template(stories, template)
    chat = [USER, called("look"), told("a cat"), called("pet"), told("purr"), SECOND]
    report = Report()
    text = encode_row({"messages": chat}, tokenizer, "here", report=report)
    assert [one.strip() for one in said(tokenizer, text)] == answers
    assert not report.changed


def test_what_is_said_behind_a_tools_word(stories: Any) -> None:
    """The template moves it there; then the call alone is learned, or the answer is counted."""
    tokenizer = with_template(stories, templates.MOVED)
    chat = [USER, called("look", content="It sleeps."), told("a cat"), OTHER, SECOND]
    text = encode_row({"messages": chat}, tokenizer, "here")
    assert "(look)[a cat]It sleeps." in tokenizer.decode(text.tokens)
    assert not any("a cat" in one for one in said(tokenizer, text))
    assert said(tokenizer, text)[-1] == "We play.<end_of_turn>"


def test_turn_that_ends_where_the_next_one_begins(stories: Any) -> None:
    tokenizer = with_template(stories, templates.NEXT_TURN)
    ends = {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    tokenizer = mlx_lm.tokenizer_utils.TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=ends)
    text = encode_row({"messages": CHAT}, tokenizer, "here")
    assert said(tokenizer, text) == ["Hello, Lily!<|im_start|>", "We play."]


def test_half_a_mark_ends_no_turn(stories: Any) -> None:
    tokenizer = with_template(stories, templates.ENDS_AT_LAST)
    text = encode_row({"messages": CHAT}, tokenizer, "here")
    assert said(tokenizer, text) == ["Hello, Lily!", "We play.<|the end|>"]


def test_answers_that_cannot_be_found_are_counted(stories: Any) -> None:
    tokenizer = with_template(stories, templates.FORGETFUL)
    report = Report()
    text = encode_row({"messages": CHAT}, tokenizer, "f.jsonl, line 2", report=report)
    assert said(tokenizer, text) == ["We play.</s>"]
    assert report.changed.total() == 1
    assert list(report.places.values()) == [["f.jsonl, line 2"]]


def thinking(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{answer}"}


@pytest.mark.parametrize("enabled", [True, False])
def test_thoughts_that_the_template_takes_out(stories: Any, enabled: bool) -> None:
    tokenizer = with_template(stories, templates.QWEN3)
    config = {"enable_thinking": enabled}
    rows = [CHAT, [USER, thinking("Hello!"), OTHER, thinking("We play.")]]
    plain, thought = (
        encode_row({"messages": row}, tokenizer, "here", template_config=config) for row in rows
    )
    empty = "<think>\n\n</think>\n\n" if enabled else ""  # else it is asked with an empty one
    assert said(tokenizer, plain) == ["Hello, Lily!<|im_end|>", f"{empty}We play.<|im_end|>"]
    first, last = said(tokenizer, thought)
    assert first == "Hello!<|im_end|>"
    # Not to think and a thought part behind the mark that opens both.
    assert last == "<think>\n" * enabled + "Hm.\n</think>\n\nWe play.<|im_end|>"


def test_switch_of_a_row_wins(stories: Any) -> None:
    tokenizer = with_template(stories, templates.QWEN3)
    row = {"messages": [USER, FIRST], "chat_template_kwargs": {"enable_thinking": False}}
    text = encode_row(row, tokenizer, "here", template_config={"enable_thinking": True})
    assert said(tokenizer, text) == ["Hello, Lily!<|im_end|>"]


def test_tools_reach_the_template(stories: Any) -> None:
    tokenizer = with_template(stories, templates.QWEN3)
    tools = [{"type": "function", "function": {"name": "barn_thermometer", "parameters": {}}}]
    text = encode_row({"messages": CHAT, "tools": tools}, tokenizer, "here")
    assert "barn_thermometer" in tokenizer.decode(text.tokens)
    assert text.tokens == tokenizer.apply_chat_template(CHAT, tools=tools)
    assert len(text.answers()) == 2


TOOLS = [{"type": "function", "function": {"name": "barn_thermometer", "parameters": {}}}]


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"turns": ["Hi"]}, {"messages": [USER]}])
def test_tools_of_a_question_alone_reach_the_template(stories: Any, row: dict[str, Any]) -> None:
    tokenizer = with_template(stories, templates.QWEN3)
    given = {**row, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    text = encode_row(given, tokenizer, "here", prompts=True)
    expected = tokenizer.apply_chat_template(
        [USER], tools=TOOLS, enable_thinking=False, add_generation_prompt=True
    )
    assert text.tokens == expected


def test_stored_completions_keep_tools_and_weights(stories: Any, tmp_path: Path) -> None:
    tokenizer = with_template(stories, templates.QWEN3)
    path = tmp_path / "log.jsonl"
    request = {"messages": [USER, {**FIRST, "weight": 0}, OTHER], "tools": TOOLS}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = {"choices": [{"finish_reason": "stop", "message": SECOND}]}
    whole = {"messages": [*request["messages"], SECOND], "tools": TOOLS, **off}
    rows = [{"request": {**request, **off}, "response": answer}, whole]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, _ = read_completions(path, CompletionFilter(drop_duplicates=False))
    expected = encode_row(whole, tokenizer, "here")
    assert said(tokenizer, expected) == ["We play.<|im_end|>"]
    for text in completion_texts(kept, tokenizer):
        assert (text.tokens, text.learned) == (expected.tokens, expected.learned)


def test_fields_that_hold_nothing_reach_no_template(stories: Any) -> None:
    tokenizer = with_template(
        stories,
        "{% for m in messages %}{{ 'CALL' if 'tool_calls' in m else m.content }}</s>{% endfor %}",
    )
    chat = [{**m, "tool_calls": None, "function_call": None} for m in (USER, FIRST)]
    text = encode_row({"messages": chat}, tokenizer, "here")
    assert text.tokens == encode_row({"messages": [USER, FIRST]}, tokenizer, "here").tokens
    nothing = [USER, {"role": "assistant", "content": None, "tool_calls": None}]
    with pytest.raises(InputError, match="here: messages must be a list of role and content"):
        encode_row({"messages": nothing}, tokenizer, "here")


@pytest.mark.parametrize("prompts", [False, True])
def test_a_text_may_answer_a_list_of_messages(stories: Any, prompts: bool) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    row = {"prompt": [SYSTEM, USER], "completion": "We play."}
    text = encode_row(row, tokenizer, "here", prompts=prompts)
    assert text == encode_row({"messages": [SYSTEM, USER, SECOND]}, tokenizer, "here")


def test_answer_of_weight_0_is_read_and_not_learned(stories: Any) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    chat = [USER, {**FIRST, "weight": 0}, OTHER, SECOND]
    text = encode_row({"messages": chat}, tokenizer, "here")
    assert said(tokenizer, text) == ["We play.<|im_end|>"]


@pytest.mark.parametrize("template", [templates.CHATML, templates.LLAMA3, templates.MISTRAL])
def test_answer_that_was_cut_off_learns_no_end(stories: Any, template: str, tmp_path: Path) -> None:
    tokenizer = with_template(stories, template)
    path = tmp_path / "log.jsonl"
    choice = {"finish_reason": "length", "message": {**SECOND, "content": "Once there was"}}
    row = {"request": {"messages": CHAT[:3]}, "response": {"choices": [choice]}}
    path.write_text(json.dumps(row) + "\n")
    kept, _ = read_completions(path, CompletionFilter(drop_truncated=False))
    (text,) = completion_texts(kept, tokenizer)
    *_, last = said(tokenizer, text)
    assert last.strip() == "Once there was"
    assert text.tokens[-1] not in tokenizer.eos_token_ids
    assert text.answers()[-1][1] == len(text.tokens)
    chat = [*CHAT[:3], choice["message"]]
    row = {"messages": chat, "finish_reason": "length"}
    assert encode_row(row, tokenizer, "here") == text  # rows of mlx-lm's kind may say so, too


def test_packing_keeps_every_answer(stories: Any) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    texts = [encode_row({"messages": CHAT}, tokenizer, "here") for _ in range(3)]
    for length in (9, 40, 1000):
        rows = pack(texts, length)
        assert sum(row.num_learned for row in rows) == sum(text.num_learned for text in texts)
    (row,) = pack(texts, 1000)
    assert said(tokenizer, row) == said(tokenizer, texts[0]) * 3


def test_half_a_character_is_named(stories: Any) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    with pytest.raises(InputError, match="a message is not text: surrogates"):
        encode_prompt(tokenizer, [USER, {**FIRST, "content": "a\udfff"}, OTHER])


def test_question_alone(stories: Any) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    for row in ({"prompt": "Hi"}, {"messages": [USER]}, {"prompt": [USER]}):
        text = encode_row(row, tokenizer, "here", prompts=True)
        assert text.tokens == encode_prompt(tokenizer, "Hi")
        assert text.num_learned == 0
        kept, report = fit([text], 100, prompts=True)
        assert (kept, report.kept) == ([text], 1)
        with pytest.raises(InputError, match="nothing to learn"):
            fit([text], 100)


def test_chat_of_answers_that_are_not_to_be_learned_asks_nothing(stories: Any) -> None:
    """A student that writes its own texts is not asked to go on behind such an answer."""
    tokenizer = with_template(stories, templates.CHATML)
    chat = {"messages": [USER, {**FIRST, "weight": 0}]}
    text, question = (
        encode_row(row, tokenizer, "here", prompts=True) for row in (chat, {"messages": [USER]})
    )
    assert (text.asks, question.asks) == (False, True)
    kept, report = fit([text, question], 100, prompts=True)
    assert kept == [question]
    assert report.dropped == {"nothing to learn within 100 tokens": 1}
    report = Report(rows=2, kept=2)
    assert with_room([text, question], None, report) == [question]
    assert report.sentence() == "1 texts of 2 rows (1 nothing to learn)"


def test_what_users_of_other_projects_have(stories: Any) -> None:
    tokenizer = with_template(stories, templates.CHATML)
    expected = encode_row({"messages": CHAT}, tokenizer, "here")
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[one["role"]], "value": one["content"]} for one in CHAT]
    assert encode_row({"conversations": turns}, tokenizer, "here") == expected
    unanswered = {"conversations": [*turns, {"from": "human", "value": "Bye"}]}
    assert encode_row(unanswered, tokenizer, "here") == expected
    pair = encode_row({"prompt": "Add.\n\n1 2", "completion": "3"}, tokenizer, "here")
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert encode_row(alpaca, tokenizer, "here") == pair
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello, Lily!", "system": "Be brief."}
    chat = encode_row({"messages": [SYSTEM, USER, FIRST]}, tokenizer, "here")
    assert encode_row(alpaca, tokenizer, "here") == chat
    turns = [[USER["content"], FIRST["content"]]]
    alpaca = {"instruction": OTHER["content"], "output": SECOND["content"], "history": turns}
    assert encode_row(alpaca, tokenizer, "here") == expected
    for history in ("Hi", ["Hi"], [["Hi"]], [["Hi", 5]]):
        with pytest.raises(InputError, match=r"here: (history must be|expected a non-empty text)"):
            encode_row({**alpaca, "history": history}, tokenizer, "here")
    silent = with_template(stories, templates.QWEN3)
    config = {"chat_template_kwargs": {"enable_thinking": False}}
    row = {"instruction": "Add.", "output": "3", **config, "text": "Below is ..."}
    pair = encode_row({"prompt": "Add.", "completion": "3", **config}, silent, "here")
    assert encode_row(row, silent, "here") == pair
    listed = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert encode_row(listed, tokenizer, "here") == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": ""}, "no answer"),
        ({"instruction": "Add.", "output": None, "system": "Be brief."}, "no answer"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
            "an empty message",
        ),
    ],
)
def test_rows_of_other_projects_without_an_answer_are_counted(
    stories: Any, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    """Well-known tables have some; of Alpaca's layout the question is there to be answered."""
    tokenizer, path = with_template(stories, templates.CHATML), tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, {"messages": CHAT})))
    report = Report()
    assert len(read_texts(path, tokenizer, report=report)) == 1
    assert report.dropped == {reason: 1}
    texts = read_texts(path, tokenizer, prompts=True)
    assert [text.asks for text in texts] == ([False] if "empty" in reason else [True, False])


def test_conversation_of_unknown_speakers(stories: Any) -> None:
    with pytest.raises(InputError, match=r"here: from must be one of human, .* got 'narrator'"):
        encode_row({"conversations": [{"from": "narrator", "value": "A"}]}, stories, "here")


@pytest.mark.parametrize("value", [["human"], {"role": "human"}, 5, None, True])
def test_speakers_and_messages_of_the_wrong_kind(stories: Any, value: Any) -> None:
    for turn in ({"from": value, "value": "A"}, {"from": "gpt", "value": value}, value):
        with pytest.raises(InputError, match=r"here: (from must be|expected a|conversations must)"):
            encode_row({"conversations": [turn]}, stories, "here")
    for message in ({"role": value, "content": "A"}, {"role": "user"}, value):
        for name in ("messages", "conversations"):
            rows = {name: [message, {"role": "assistant", "content": "B"}]}
            with pytest.raises(InputError, match="here: "):
                encode_row(rows, stories, "here")
