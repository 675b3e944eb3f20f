"""All that a training reads, from all of its sources, and what is said of it."""

import gzip
import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from chat_templates import FORGETFUL, LLAMA3

from mlx_distill.checkpoint import bundled
from mlx_distill.data.corpus import Reading, Sizes, check_corpus, read_corpus
from mlx_distill.data.report import LOST, Report
from mlx_distill.data.sources import check_sources, local_file, read_rows
from mlx_distill.errors import InputError

LONG = "A long tale of a fox. " * 40


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int, name: str = "Tom") -> list[dict[str, str]]:
    return [{"text": f"{name} has {number} dogs."} for number in range(count)]


def test_every_row_is_kept_or_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [{"prompt": LONG, "completion": "The end."}] * 3
    one = write(tmp_path / "one.jsonl", *numbered(6), *pairs)
    two = write(tmp_path / "two.jsonl", *numbered(9, "Lily"), {"text": LONG})
    sizes = Sizes(held_out=6, max_texts=10, max_length=32)
    corpus = read_corpus([one, two], None, tokenizer, Reading(), sizes)
    report, held = corpus.report, corpus.valid_report
    assert report.rows + held.rows == 19
    assert held.rows == 6
    assert len(corpus.texts) == report.kept == report.rows - report.dropped.total()
    assert len(corpus.valid) == held.kept == held.rows - held.dropped.total()
    dropped = report.dropped + held.dropped
    assert dropped == {"nothing to learn within 32 tokens": 3, "behind the first 10": 3}
    assert all(len(text.tokens) <= 32 for text in [*corpus.texts, *corpus.valid])
    assert corpus.to_dict()["held_out"]["rows"] == 6
    assert any("held-out texts kept" in line for line in corpus.lines())


@pytest.mark.parametrize("long", ["drop", "refuse"])
def test_held_out_texts_are_treated_as_those_that_are_learned(
    tmp_path: Path, tokenizer: Any, long: str
) -> None:
    data = write(tmp_path / "data.jsonl", *numbered(4))
    valid = write(tmp_path / "valid.jsonl", {"text": LONG}, *numbered(2), {"text": LONG})
    sizes = Sizes(max_length=32, long=long)
    if long == "refuse":
        with pytest.raises(InputError, match="2 of 4 held-out texts are longer than 32 tokens"):
            read_corpus([data], valid, tokenizer, Reading(), sizes)
        return
    corpus = read_corpus([data], valid, tokenizer, Reading(), sizes)
    assert len(corpus.valid) == 2
    assert corpus.valid_report.places["longer than 32 tokens"] == [
        f"{valid}, line 1",
        f"{valid}, line 4",
    ]
    write(tmp_path / "valid.jsonl", *[{"text": LONG}] * 5)
    message = "none of 5 held-out texts has anything to learn: 5 longer than 32 tokens"
    with pytest.raises(InputError, match=message):
        read_corpus([data], valid, tokenizer, Reading(), sizes)


def test_packing_splits_long_texts(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "data.jsonl", {"text": LONG}, *numbered(4))
    valid = write(tmp_path / "valid.jsonl", *numbered(1))
    options = (tokenizer, Reading())
    whole = read_corpus([data], valid, *options, Sizes(max_length=4096))
    packed = read_corpus([data], valid, *options, Sizes(max_length=32, pack=True))
    learned = [sum(text.num_learned for text in c.texts) for c in (whole, packed)]
    assert learned[0] == learned[1]
    assert all(len(text.tokens) <= 32 for text in packed.texts)
    assert not packed.report.changed
    dropped = read_corpus([data], valid, *options, Sizes(max_length=32, pack=True, long="drop"))
    assert dropped.report.dropped == {"longer than 32 tokens": 1}


def test_stored_completions_are_counted_together(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"input": f"Hi {n}", "output": "Hello!"} for n in range(3)]
    one = write(tmp_path / "one.jsonl", *rows, {"input": "Hi"})
    two = write(tmp_path / "two.jsonl", *rows, {"input": "Hi", "output": ""})
    corpus = read_corpus(
        [one, two], None, tokenizer, Reading(layout="completions"), Sizes(held_out=2)
    )
    assert (corpus.report.rows, corpus.report.kept) == (6, 4)
    assert corpus.report.dropped == {"unknown layout": 1, "no answer": 1}


def test_questions_alone_are_not_packed(tmp_path: Path, tokenizer: Any) -> None:
    """They are for the student to answer; in a row of texts nobody would ask them."""
    questions = [{"prompt": f"Question {n}?"} for n in range(4)]
    data = write(tmp_path / "data.jsonl", *questions, *numbered(6))
    valid = write(tmp_path / "valid.jsonl", *numbered(1))
    reading, sizes = Reading(prompts=True), Sizes(max_length=32, pack=True)
    texts = read_corpus([data], valid, tokenizer, reading, sizes).texts
    asked = [text.tokens for text in texts if not text.num_learned]
    assert asked == [tokenizer.encode(row["prompt"]) for row in questions]
    write(tmp_path / "data.jsonl", *questions)
    assert len(read_corpus([data], valid, tokenizer, reading, sizes).texts) == 4


def test_choices_are_counted_by_their_rows(tmp_path: Path, tokenizer: Any) -> None:
    """A row may have some of its choices among the texts to learn and others held out."""
    rows = [
        {"prompt": f"Hi {n}", "choices": [{"text": f"Dog {n} {m}."} for m in range(8)]}
        for n in range(2)
    ]
    data = [write(tmp_path / f"{name}.jsonl", *rows) for name in ("one", "two")]
    reading, sizes = Reading("completions"), Sizes(held_out=8)
    corpus = read_corpus(data, None, tokenizer, reading, sizes)
    assert (corpus.report.rows, corpus.report.kept) == (4, 24)
    assert (corpus.valid_report.rows, corpus.valid_report.kept) == (4, 8)
    files = [text.source.file for text in corpus.valid if text.source]
    assert sorted(files) == sorted(data * 4)


def test_what_was_done_with_texts_is_counted_where_they_are(tmp_path: Path) -> None:
    """With this template, the last answer of a chat alone is found."""
    template = {"chat_template": FORGETFUL}
    tokenizer = mlx_lm.utils.load_tokenizer(bundled("stories-14m"), template)
    chat = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    long = [*chat, chat[0], {"role": "assistant", "content": LONG}]
    data = write(tmp_path / "data.jsonl", *[{"messages": chat * 2}] * 7, {"messages": long})
    sizes = Sizes(held_out=2, max_texts=3, max_length=64)
    corpus = read_corpus([data], None, tokenizer, Reading(), sizes)
    assert len(corpus.texts) == 3
    assert corpus.report.changed == {LOST: 3}
    assert len(corpus.report.places[LOST]) <= 3
    assert corpus.valid_report.changed == {LOST: len(corpus.valid)}


def test_first_question_beside_a_chat(tmp_path: Path) -> None:
    """Where a student writes itself, too, the chat's answers are learned."""
    template = {"chat_template": LLAMA3}
    tokenizer = mlx_lm.utils.load_tokenizer(bundled("stories-14m"), template)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = [{"prompt": "Hi", "messages": chat}] * 3
    rows += [{"prompt": "Hi", "messages": None}, {"prompt": "Hi", "messages": []}]
    valid = write(tmp_path / "valid.jsonl", *rows[:1])
    data = write(tmp_path / "data.jsonl", *rows)
    corpus = read_corpus([data], valid, tokenizer, Reading(prompts=True), Sizes())
    assert [text.num_learned > 0 for text in corpus.texts] == [True] * 3 + [False] * 2


def test_packed_file_and_one_with_a_mark_of_its_byte_order(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(json.dumps(row) + "\n" for row in numbered(3))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert local_file(tmp_path, "train") == tmp_path / "train.jsonl.gz"
    expected = [row for _, row in read_rows(tmp_path / "train.jsonl.gz")]
    assert expected == numbered(3)
    assert [row for _, row in read_rows(tmp_path / "bom.jsonl")] == expected
    # Two such files, one behind the other.
    (tmp_path / "both.jsonl").write_bytes(2 * (tmp_path / "bom.jsonl").read_bytes())
    assert [row for _, row in read_rows(tmp_path / "both.jsonl")] == 2 * expected
    assert len(Reading().texts(tmp_path, tokenizer, Report())) == 3


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = [{"text": "A dog."}, {"messages": chat}, {"prompt": "Hi", "completion": "Ho."}]
    path = tmp_path / "train.parquet"
    parquet.write_table(
        arrow.Table.from_pylist(
            rows,
            arrow.schema(
                [
                    ("text", arrow.string()),
                    (
                        "messages",
                        arrow.list_(
                            arrow.struct([("role", arrow.string()), ("content", arrow.string())])
                        ),
                    ),
                    ("prompt", arrow.string()),
                    ("completion", arrow.string()),
                ]
            ),
        ),
        path,
    )
    assert [row for _, row in read_rows(path)] == rows
    assert [place for place, _ in read_rows(path)][2] == f"{path}, row 3"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as parquet: "):
        list(read_rows(path))


def test_a_table_gives_no_row_the_fields_of_others(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    def calls(**arguments: int) -> dict[str, Any]:
        call = {"function": {"name": "add", "arguments": arguments}}
        return {"role": "assistant", "tool_calls": [call]}

    question = {"role": "user", "content": "Hi"}
    rows = [{"messages": [question, calls(x=1)]}, {"messages": [question, calls(y=2)]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [row for _, row in read_rows(tmp_path / "train.parquet")] == rows


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow to be read; install mlx-distill\[parquet"):
        list(read_rows(tmp_path / "train.parquet"))


def test_sources_are_checked_without_reading_them(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "A dog."}\n{oops\n')
    check_sources([good])
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(InputError, match="line 1: not JSON"):
        check_sources([good, tmp_path / "bad.jsonl"])
    with pytest.raises(InputError, match=r"there is no file .*none\.jsonl"):
        check_corpus([str(good)], str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="zero byte"):
        check_sources(["a\0b"])
