"""Answers as token ids in one file: read as they are, and refused in a sentence."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_model

from mlx_distill import train_drafter
from mlx_distill.calibration.pair import Pair
from mlx_distill.data.report import Report
from mlx_distill.distillation.answer_files import WrittenAnswers, read_answers
from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.judging import Material
from mlx_distill.target.context import position_limit

ARRAYS: dict[str, Any] = {
    "prompt": np.array([1, 2, 3, 4], np.uint16),
    "prompt_len": np.array([3, 1]),
    "answer": np.array([5, 6, 7, 8, 9], np.uint16),
    "answer_len": np.array([2, 3]),
    "greedy": np.array([True, False]),
    "cls": np.array(["chat", "code"]),
}


def file_of(folder: Path, **changes: Any) -> Path:
    path = folder / "answers.npz"
    arrays = {name: value for name, value in (ARRAYS | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_rows_are_cut_by_their_lengths(tmp_path: Path):
    found = read_answers(file_of(tmp_path))
    assert found.responses == [Response([1, 2, 3], [5, 6]), Response([4], [7, 8, 9])]
    assert (found.greedy, found.kinds) == ([True, False], ["chat", "code"])
    assert (found.longest, found.num_tokens) == (5, 5)
    assert found.greedy_ones() == WrittenAnswers([Response([1, 2, 3], [5, 6])], [True], ["chat"])
    assert read_answers(file_of(tmp_path, cls=None)).kinds == []


def test_what_a_model_cannot_read_is_counted(tmp_path: Path):
    report = Report(rows=2)
    kept = read_answers(file_of(tmp_path)).within(4, report)
    assert [one.prompt for one in kept.responses] == [[4]]
    assert (report.kept, report.reasons()) == (1, "1 longer than the model's 4 tokens")


def test_answers_beyond_the_positions_of_a_model_are_not_judged_by(
    tmp_path: Path, bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
):
    """Their rows of the table would be foreign memory."""
    tokens = {"answer": np.full(303, 5), "answer_len": np.array([300, 3])}
    path = file_of(tmp_path, **tokens, greedy=np.array([True, True]))
    pair = Pair(tiny_model("gpt2"), bundled_pair[1], NGramDrafter())
    assert position_limit(pair.model) == 256
    material = Material.read(path, pair)
    assert (material.prompts, material.kinds) == ([[4]], ["code"])
    assert "1 longer than the model's 256 tokens: answer 1" in capsys.readouterr().err
    written = read_answers(path)
    assert written.readable(None) is written
    with pytest.raises(InputError, match="no answer can be read: 2 longer than the model's 3 "):
        written.readable(3)


def test_prompts_without_room_for_an_answer_are_not_judged_by(
    tmp_path: Path, bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
):
    """One of them ended the command."""
    path = tmp_path / "asked.jsonl"
    long = {"prompt": "the cat " * 300, "category": "long"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (long, {"prompt": "Once"})))
    pair = Pair(tiny_model("gpt2"), bundled_pair[1], NGramDrafter())
    material = Material.read(path, pair, 1)
    assert (len(material.prompts), material.kinds) == (1, [""])
    assert "1 without room for an answer in the model's 256 tokens" in capsys.readouterr().err
    path.write_text(json.dumps(long))
    with pytest.raises(InputError, match=r"no prompt of .* can be answered: 1 without room"):
        Material.read(path, pair)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"answer": None}, "holds no answers: it lacks answer"),
        ({"answer_len": np.array([2, 2])}, "answer and answer_len do not fit"),
        ({"prompt_len": np.array([4, 0])}, "prompt and prompt_len do not fit"),
        ({"answer_len": np.array([2**62 + 2, 2**62 + 3])}, "answer and answer_len do not fit"),
        ({"answer_len": np.array([2**63 + 2, 2**63 + 3], np.uint64)}, "answer_len do not fit"),
        ({"answer_len": np.array([-1, 6])}, "answer and answer_len do not fit"),
        ({"prompt": np.zeros(0, int)}, "prompt and prompt_len do not fit"),
        ({"prompt": np.array(1)}, "prompt and prompt_len do not fit"),
        ({"prompt": np.array([1, -2, 3, 4])}, "prompt holds -2, which is no token"),
        (
            {"answer": np.array([5, 6, 7, 8, 2**63], np.uint64)},
            "answer holds 9223372036854775808, which is no token",
        ),
        ({"answer": np.zeros(5)}, "answer and answer_len do not fit"),
        ({"greedy": np.array([True])}, "do not fit"),
        ({"greedy": np.array(True)}, "greedy is not true or false for every answer"),
        ({"greedy": np.zeros((2, 2), bool)}, "greedy is not true or false"),
        ({"greedy": np.array(["False", "False"])}, "greedy is not true or false"),
        ({"greedy": np.array([np.nan, 0])}, "greedy is not true or false"),
        ({"greedy": np.array([2, 0])}, "greedy is not true or false"),
        ({"greedy": np.array([None, True])}, "cannot be read as answers: Object arrays"),
        ({"cls": np.array(["chat"])}, "1 kinds for 2 answers"),
        ({"cls": np.array("chat")}, "1 kinds for 2 answers"),
        ({"cls": np.zeros((2, 2))}, "4 kinds for 2 answers"),
        (
            {"target": np.array("{bad")},
            r"answers\.npz is damaged: its target is no JSON: Expecting",
        ),
        ({"target": np.array("[1]")}, r"answers\.npz is damaged: its target is no JSON object"),
    ],
)
def test_damage_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=sentence):
        read_answers(file_of(tmp_path, **changes))


def test_zeros_and_ones_are_truths(tmp_path: Path):
    assert read_answers(file_of(tmp_path, greedy=np.array([0, 1]))).greedy == [False, True]


def packed(folder: Path) -> tuple[Path, zipfile.ZipInfo]:
    """Return a compressed file of answers, and where its first array stands in it."""
    path = folder / "answers.npz"
    np.savez_compressed(path, **{**ARRAYS, "prompt": np.arange(4), "prompt_len": [3, 1]})
    with zipfile.ZipFile(path) as found:
        return path, found.getinfo("prompt.npy")


def changed(path: Path, place: int, value: int) -> Path:
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "sentence"),
    [
        (8, 1, "encrypted"),  # the flags of an entry
        (6, 99, "version"),  # that can read it
        (10, 99, "compression"),
    ],
)
def test_entries_that_cannot_be_unpacked_are_named(
    tmp_path: Path, offset: int, value: int, sentence: str
):
    path, _ = packed(tmp_path)
    first = path.read_bytes().index(b"PK\x01\x02")  # of the list of entries at the end
    with pytest.raises(InputError, match=rf"answers\.npz cannot be read as answers: .*{sentence}"):
        read_answers(changed(path, first + offset, value))


def test_flipped_bytes_are_named_wherever_they_are(tmp_path: Path):
    path, entry = packed(tmp_path)
    whole = path.read_bytes()
    names = entry.header_offset + 26  # the lengths of its name and of what stands behind it
    sizes = int.from_bytes(whole[names : names + 2], "little"), whole[names + 2]
    start = names + 4 + sum(sizes)
    for place in range(start, start + entry.compress_size):
        path.write_bytes(whole)
        with pytest.raises(InputError, match=r"answers\.npz cannot be read as answers: "):
            read_answers(changed(path, place, whole[place] ^ 0xFF))


def test_what_is_no_array_is_named(tmp_path: Path):
    path = file_of(tmp_path, greedy=None)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("greedy", b"yes")
    with pytest.raises(InputError, match="greedy is no array"):
        read_answers(path)


@pytest.mark.parametrize(
    "header", ["{'descr': '<i8', 'shape': (1 <<", "{'descr': [[1]]}", "(" * 90]
)
def test_odd_headers_of_arrays_are_named(tmp_path: Path, header: str):
    path = file_of(tmp_path, greedy=None)
    text = header.encode() + b"\n"
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("greedy.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(InputError, match="cannot be read as answers"):
        read_answers(path)


def test_answers_of_another_model_are_refused(tmp_path: Path):
    answers = read_answers(file_of(tmp_path))
    answers.check(10)
    with pytest.raises(InputError, match="token 9 is beyond this one's 9"):
        answers.check(9)
    with pytest.raises(InputError, match="none of the answers was written at temperature 0"):
        answers.only([1]).greedy_ones()
    below = replace(answers, responses=[Response([-1], [2]), Response([1], [2])])
    with pytest.raises(InputError, match="the answers are damaged: -1 is no token"):
        below.check(10)


WRITER = {
    "tokenizer_hash": "a",
    "hidden_size": 64,
    "template_hash": "t",
    "weights_hash": "w",
    "weights_type": "bfloat16",
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer_hash": "b"}, "its tokenizer hash is a, this one's is b"),
        ({"hidden_size": 32}, "its hidden size is 64, this one's is 32"),
        ({"template_hash": ""}, "its template hash is t, this one's is none"),
        ({"weights_hash": "v"}, "its weights hash is w, this one's is v"),
    ],
)
def test_answers_of_another_writer_are_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
):
    written = replace(read_answers(file_of(tmp_path)), target=WRITER)
    written.check(10, WRITER)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=f"the answers are another model's: {sentence}"):
        written.check(10, WRITER | change)


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ({}, "the file does not say what model wrote the answers; they are taken for this one's"),
        (WRITER | {"weights_type": "4-bit", "weights_hash": "v"}, "writer had 4-bit weights, this"),
    ],
)
def test_what_is_not_known_of_a_writer_is_said(
    tmp_path: Path, by: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
):
    replace(read_answers(file_of(tmp_path)), target=by).check(10, WRITER)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x80\x04pickled"])
def test_the_command_refuses_what_is_no_file_of_answers(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "x.npz").write_bytes(content)
    flags = ["--answers", str(tmp_path / "x.npz"), "--output", str(tmp_path / "d")]
    assert train_drafter.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("cannot be read as answers: it is no npz file\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npz"]
    assert train_drafter.main(["--output", str(tmp_path / "d")]) == 2
    assert "--data" in capsys.readouterr().err
