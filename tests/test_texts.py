"""Texts to learn from: what is read, what is learned of it, and in which order."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mlx_lm
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError

from mlx_distill.checkpoint import bundled
from mlx_distill.data.encoding import encode_row, read_texts
from mlx_distill.data.report import Report
from mlx_distill.data.selection import fit, held_out_rows, limited, pack, split_held_out
from mlx_distill.data.sources import local_file
from mlx_distill.data.texts import Source, Text
from mlx_distill.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


# Opens an answer with a mark that a finished answer has no longer, as templates for thinking do.
THINKING = TEMPLATE.replace("[assistant]{%", "[assistant] <think>{%")


FAILING = "{{ raise_exception('roles must alternate') }}"


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, Lily!"},
]


PAIR = {"prompt": "Once upon a time", "completion": " there was a dog."}


pytestmark = pytest.mark.usefixtures("no_hub")


def templated(template: str) -> Any:
    return mlx_lm.utils.load_tokenizer(
        bundled("stories-14m"), tokenizer_config_extra={"chat_template": template}
    )


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return templated(TEMPLATE)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(text: Text) -> list[int]:
    return [token for token, mark in zip(text.tokens, text.learned, strict=True) if mark]


# --------------------------------------------------------------------------------------- the rows


def test_text(tokenizer: Any) -> None:
    text = encode_row({"text": "A dog ran."}, tokenizer, "here", False)
    assert text == Text([*tokenizer.encode("A dog ran."), tokenizer.eos_token_id])
    assert text.tokens[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_prompt_and_completion(tokenizer: Any, learn_prompts: bool) -> None:
    text = encode_row(PAIR, tokenizer, "here", learn_prompts)
    prompt = tokenizer.encode("Once upon a time")
    answer = tokenizer.encode("Once upon a time there was a dog.")[len(prompt) :]
    assert text.tokens == [*prompt, *answer, tokenizer.eos_token_id]
    assert text == Text.behind(text.tokens, 1 if learn_prompts else len(prompt))
    if not learn_prompts:
        assert learned(text) == [*answer, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("One and one is", " two."),
        ("One and one is", "two."),  # a token would reach across the border
        ("One and one is ", "two."),
        ("One and one is ", " two."),
        ("Count:\n", "\none"),
    ],
)
def test_a_pair_is_written_as_it_is(tokenizer: Any, prompt: str, completion: str) -> None:
    """This tokenizer puts a blank in front of what it is given: of the answer, too, it would."""
    tokens = encode_row({"prompt": prompt, "completion": completion}, tokenizer, "here").tokens
    assert tokens[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == prompt + completion


def test_eos_is_appended_once(tokenizer: Any) -> None:
    """A text that ends with it keeps its own."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token
    rows = [
        {"text": "A dog.</s>"},
        {"text": "A dog."},
        {"prompt": "A", "completion": "dog.</s>"},
        {"prompt": f"{bos}A", "completion": "dog."},
    ]
    for row in rows:
        tokens = encode_row(row, tokenizer, "here", False).tokens
        assert tokens[-1] == eos
        assert tokens.count(eos) == 1
        assert tokens.count(tokenizer.bos_token_id) == 1


def test_text_that_was_cut_off_has_no_end(tokenizer: Any) -> None:
    for row in ({"text": "A dog"}, PAIR):
        whole = encode_row(row, tokenizer, "here")
        assert encode_row({**row, "stop_reason": "end_turn"}, tokenizer, "here") == whole
        cut = encode_row({**row, "stop_reason": "max_tokens"}, tokenizer, "here")
        assert cut.tokens == whole.tokens[:-1]
        assert cut.source
        assert not cut.source.ended


class NoEnd:
    """A tokenizer that has no token for the end."""

    bos_token = eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def test_tokenizer_without_eos() -> None:
    assert encode_row({"text": "ab"}, NoEnd(), "here", False) == Text([97, 98])
    row = {"prompt": "ab", "completion": "c"}
    assert encode_row(row, NoEnd(), "here", False) == Text.behind([97, 98, 99], 2)


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_chat(chat_tokenizer: Any, learn_prompts: bool) -> None:
    """The template decides how a chat ends; the last answer is learned."""
    text = encode_row({"messages": CHAT}, chat_tokenizer, "here", learn_prompts)
    assert text.tokens == chat_tokenizer.apply_chat_template(CHAT)
    asked = chat_tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True)
    assert text == Text.behind(text.tokens, 1 if learn_prompts else len(asked))
    if not learn_prompts:
        assert chat_tokenizer.decode(learned(text)) == "Hello, Lily!\n"


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_prompt_goes_through_the_template(chat_tokenizer: Any, learn_prompts: bool) -> None:
    chat = [
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    text = encode_row(PAIR, chat_tokenizer, "here", learn_prompts)
    assert text == encode_row({"messages": chat}, chat_tokenizer, "here", learn_prompts)
    assert (text == Text(text.tokens)) == learn_prompts


def test_answer_begins_where_it_differs_from_the_template_for_writing() -> None:
    """Not after as many tokens as that has: they would be the answer's."""
    tokenizer = templated(THINKING)
    text = encode_row({"messages": CHAT}, tokenizer, "here", False)
    assert tokenizer.decode(learned(text)) == "Hello, Lily!\n"


def test_template_that_fails_is_named_with_its_row() -> None:
    tokenizer = templated("{{ raise_exception('no such role') }}")
    message = r"^here: the tokenizer's chat template failed: no such role$"
    with pytest.raises(InputError, match=message):
        encode_row({"messages": CHAT}, tokenizer, "here", False)


def test_answer_to_nothing(chat_tokenizer: Any) -> None:
    text = encode_row({"messages": CHAT[-1:]}, chat_tokenizer, "here", False)
    assert text.tokens == chat_tokenizer.apply_chat_template(CHAT[-1:])
    assert chat_tokenizer.decode(learned(text)) == "Hello, Lily!\n"


def test_layout_with_both_keys_is_a_pair(tokenizer: Any) -> None:
    row = {**PAIR, "text": "Other.", "messages": CHAT}
    assert encode_row(row, tokenizer, "here", False) == encode_row(PAIR, tokenizer, "here", False)


BAD_ROWS = [
    ({"prompt": "Hi"}, "expected text, prompt and completion, or messages, got ['prompt']"),
    ({}, "expected text, prompt and completion, or messages, got []"),
    ({"text": ""}, "expected a non-empty text, got ''"),
    ({"text": 3}, "expected a non-empty text, got 3"),
    ({"text": None}, "expected a non-empty text, got None"),
    ({"text": "\ud800"}, "not text: surrogates not allowed at 0"),
    ({"prompt": "Hi", "completion": ""}, "expected a non-empty text, got ''"),
    ({"prompt": "", "completion": "Hi"}, "expected a non-empty text, got ''"),
    ({"prompt": "Hi", "completion": "a\ud800"}, "not text: surrogates not allowed at 1"),
    ({"messages": "Hi"}, "messages must be a list of role and content"),
    ({"messages": ["Hi"]}, "messages must be a list of role and content"),
    ({"messages": [{"content": "Hi"}]}, "messages must be a list of role and content"),
    ({"messages": [{"role": "user"}]}, "messages must be a list of role and content"),
    (
        {"messages": [{"role": "user", "content": None}, CHAT[-1]]},
        "messages must be a list of role and content",
    ),
    (
        {"messages": [CHAT[0], CHAT[-1] | {"weight": 0.5}]},
        "the weight of a message must be 0 or 1, got 0.5",
    ),
    (
        {"messages": [CHAT[0], CHAT[-1] | {"weight": "no"}]},
        "the weight of a message must be 0 or 1, got 'no'",
    ),
    ({"messages": []}, "the last message must be the assistant's, to learn from"),
    ({"messages": CHAT[:-1]}, "the last message must be the assistant's, to learn from"),
    ({"messages": CHAT}, "a chat needs a tokenizer with a chat template; this has none"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_row_is_named_by_its_line(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "bad.jsonl", {"text": "Fine."}, PAIR, row)
    with pytest.raises(InputError, match=re.escape(f"{path}, line 3: {reason}")):
        read_texts(path, tokenizer)


def test_failing_template_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {"text": "Fine."}, {"messages": CHAT})
    with pytest.raises(InputError, match=r"bad.jsonl, line 2: .*failed: roles must alternate"):
        read_texts(path, templated(FAILING))


def test_bad_line_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "Fine."}\n\n{oops\n')
    with pytest.raises(InputError, match=r"bad.jsonl, line 3: not JSON"):
        read_texts(path, tokenizer)


# ------------------------------------------------------------------------------------ the sources


def test_rows_of_several_layouts(tmp_path: Path, chat_tokenizer: Any) -> None:
    rows = [{"text": "A dog."}, PAIR, {"messages": CHAT}]
    path = write(tmp_path / "mixed.jsonl", *rows)
    for learn_prompts in (False, True):
        texts = read_texts(path, chat_tokenizer, learn_prompts=learn_prompts)
        assert texts == [encode_row(row, chat_tokenizer, "here", learn_prompts) for row in rows]
        assert all(text == Text(text.tokens) for text in texts[1:]) == learn_prompts


def test_folder_and_its_splits(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "train.jsonl", {"text": "A dog."}, {"text": "A cat."})
    write(tmp_path / "valid.jsonl", {"text": "A bird."})
    assert len(read_texts(tmp_path, tokenizer)) == 2
    assert len(read_texts(str(tmp_path), tokenizer, split="valid")) == 1
    assert local_file(tmp_path, "valid") == tmp_path / "valid.jsonl"
    with pytest.raises(InputError, match=r"there is no file .*test\.jsonl"):
        read_texts(tmp_path, tokenizer, split="test")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "mine.jsonl", {"text": "A dog."})
    assert local_file("~/mine.jsonl", "train") == path


@pytest.mark.parametrize(
    "name", ["none.jsonl", "a/none.jsonl", "./a/b", "/a/b", "a/b/c", "plain", "~/none"]
)
def test_missing_file_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(InputError, match=r"^there is no file [^,]*$"):
        local_file(name, "train")


def test_hub_dataset_without_network(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="could not be fetched from the hub") as error:
        read_texts("someone/stories", tokenizer, split="valid")
    message = str(error.value)
    assert "there is no file someone/stories, and valid.jsonl of a dataset" in message
    assert "\n" not in message


def test_hub_dataset(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*names: str, **options: str) -> str:
        asked.append((names, options))
        return str(write(tmp_path / "fetched.jsonl", {"text": "A dog."}))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(read_texts("someone/stories", tokenizer, split="valid")) == 1
    assert asked == [(("someone/stories", "valid.jsonl"), {"repo_type": "dataset"})]


def test_hub_dataset_of_another_layout(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a folder; what else goes wrong ends the search."""
    names = []

    def download(name: str, file: str, repo_type: str) -> str:
        names.append(file)
        if name == "someone/secrets":
            raise OSError("401")
        if file != "train.jsonl.gz":
            raise EntryNotFoundError(f"no {file}")
        path = tmp_path / file
        path.write_bytes(gzip.compress(b'{"text": "A dog."}\n'))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(read_texts("someone/stories", tokenizer)) == 1
    assert names == ["train.jsonl", "train.jsonl.gz"]
    with pytest.raises(InputError, match=r"valid\.jsonl of a dataset .*: no valid\.jsonl$"):
        read_texts("someone/stories", tokenizer, split="valid")
    del names[:]
    with pytest.raises(InputError, match="401"):
        read_texts("someone/secrets", tokenizer)
    assert names == ["train.jsonl"]


def test_empty_file(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no texts"):
        read_texts(path, tokenizer)


# --------------------------------------------------------------------------------- fitting, packing

SIZES = [Text.behind([*range(10)], 4), Text.behind([*range(5)], 4), Text([*range(6)]), Text([7])]


def test_cutting_keeps_the_beginning() -> None:
    kept, report = fit(SIZES, 5)
    assert kept == [Text.behind([0, 1, 2, 3, 4], 4), SIZES[1], Text([0, 1, 2, 3, 4])]
    assert (report.rows, report.kept) == (4, 3)
    assert report.dropped == {"nothing to learn within 5 tokens": 1}
    assert report.changed == {"cut to 5 tokens": 2}


def test_cutting_into_a_prompt_leaves_nothing_to_learn() -> None:
    """What is dropped is not said to be cut."""
    kept, report = fit(SIZES, 4)
    assert kept == [Text([0, 1, 2, 3])]
    assert report.dropped == {"nothing to learn within 4 tokens": 3}
    assert report.changed == {"cut to 4 tokens": 1}


def test_dropping_keeps_whole_texts() -> None:
    kept, report = fit(SIZES, 6, "drop")
    assert kept == SIZES[1:3]
    assert report.dropped == {"longer than 6 tokens": 1, "nothing to learn within 6 tokens": 1}
    assert not report.changed


def test_chat_is_never_cut(chat_tokenizer: Any) -> None:
    row = {"messages": [*CHAT, CHAT[1], CHAT[2]]}
    chat = encode_row(row, chat_tokenizer, "f.jsonl, line 3")
    length = len(chat.tokens)
    assert fit([chat, SIZES[2]], length)[0] == [chat, SIZES[2]]
    kept, report = fit([chat, SIZES[2]], length - 1)
    assert kept == [SIZES[2]]
    assert report.lines()[1:] == [f"1 longer than {length - 1} tokens: f.jsonl, line 3"]


def test_refusing() -> None:
    with pytest.raises(InputError, match="2 of 4 texts are longer than 5 tokens; cut or drop"):
        fit(SIZES, 5, "refuse")
    kept, report = fit(SIZES, 10, "refuse")
    assert kept == SIZES[:3]
    assert report.dropped == {"nothing to learn within 10 tokens": 1}


def test_nothing_fits() -> None:
    message = "none of 4 held-out texts has anything to learn: 4 nothing to learn within 1 tokens"
    with pytest.raises(InputError, match=message):
        fit(SIZES, 1, report=Report(noun="held-out texts"))
    with pytest.raises(InputError, match="none of 4 texts has anything to learn: 3 longer than 3"):
        fit(SIZES, 3, "drop")
    with pytest.raises(InputError, match="long must be one of cut, drop, refuse, got bend"):
        fit(SIZES, 3, "bend")


def test_limit_counts_what_it_leaves_out() -> None:
    report = Report()
    assert limited(SIZES, 3, report) == SIZES[:3]
    assert report.dropped == {"behind the first 3": 1}
    assert limited(SIZES, None, report) == SIZES


def test_held_out_rows_come_from_every_group() -> None:
    groups = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    held = held_out_rows(groups, 20, 0)
    assert len(held) == len(set(held)) == 20
    assert held == sorted(held) == held_out_rows(groups, 20, 0)
    assert held != held_out_rows(groups, 20, 1)
    counts = [sum(groups[row] == name for row in held) for name in "abc"]
    assert max(abs(found - share) for found, share in zip(counts, (12, 6, 2), strict=True)) <= 1
    assert not set(held[-6:]) <= set(range(90, 100))  # not the tail
    every = {row for seed in range(200) for row in held_out_rows(groups, 20, seed)}
    assert every == set(range(100))


def test_held_out_texts_come_from_every_file() -> None:
    texts = [
        Text([1, row, file], source=Source(f"{file}.jsonl, line {row}"))
        for file in range(3)
        for row in range(10)
    ]
    learn, held = split_held_out(texts, 6, 0)
    assert sorted(text.tokens[2] for text in held) == [0, 0, 1, 1, 2, 2]
    assert [text for text in texts if text in held] == held
    assert [text for text in texts if text not in held] == learn
    with pytest.raises(InputError, match="30 texts are too few: 30 are held out"):
        split_held_out(texts, 30, 0)


@pytest.mark.parametrize("length", [2, 3, 7, 11, 100])
def test_packing_loses_nothing(length: int) -> None:
    """Neither what is read nor what is learned, and a text longer than a row is split."""
    random = np.random.default_rng(length)
    texts = [
        Text(
            [*range(100 * row, 100 * row + 3 + 2 * row)],
            (random.random(3 + 2 * row) < 0.8).tolist(),
        )
        for row in range(6)
    ]
    rows = pack(texts, length)
    assert sorted(token for row in rows for token in learned(row)) == sorted(
        token for text in texts for token in learned(text)
    )
    assert all(len(row.tokens) == length for row in rows[:-1])
    assert len(rows[-1].tokens) <= length
    assert all(row.num_learned for row in rows)


def test_packing_learns_answers_alone() -> None:
    texts = [Text.behind([*range(10 * n, 10 * n + 6)], 4) for n in range(1, 4)]
    rows = pack(texts, 7)
    assert [row.tokens[0] for row in rows] == [10, 20, 30]
    assert [learned(row) for row in rows] == [[14, 15], [24, 25], [34, 35]]
    (first, second) = pack([Text.behind([*range(20)], 18)], 7)
    assert (first.tokens, second.tokens) == ([*range(12, 19)], [18, 19])
    assert (learned(first), learned(second)) == ([18], [19])


def test_first_token_is_never_learned() -> None:
    assert Text([1, 2, 3]).learned == (False, True, True)
    assert Text([1, 2, 3], [True, False, True]).learned == (False, False, True)
    assert Text.behind([1, 2, 3], 0) == Text([1, 2, 3])
    assert Text([]).learned == ()
    with pytest.raises(ValueError, match="2 marks do not fit 3 tokens"):
        Text([1, 2, 3], [True, True])
