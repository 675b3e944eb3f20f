"""Models that somebody made to do harm, or that a program made badly: one sentence, status 2.

Every case is a kind; none of them may hang, grow, run code of its own or end in a traceback.
"""

import importlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from damage import (
    Edit,
    Run,
    changed,
    delete,
    edit_arrays,
    edit_header,
    set_fields,
    write,
)

from mlx_distill.checkpoint import bundled
from mlx_distill.config import read_yaml
from mlx_distill.data.sources import read_rows
from mlx_distill.distillation.students import from_config
from mlx_distill.errors import InputError, one_line
from mlx_distill.evaluation.judging import check_material
from mlx_distill.files import output_path, read_json, read_jsonl, usable_path, write_whole
from mlx_distill.parsing import parse_yaml

generate = importlib.import_module("mlx_distill.generate")
SMALL = bundled("stories-4m")
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000
NORM = "model.norm.weight"
MULTIPLYING = "".join(
    f"{y}: &{y} [{', '.join(10 * [f'*{x}'])}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)
)


def first_entry(**fields: Any) -> Edit:
    """Return an edit of the first array's entry in a header; None takes a field away."""

    def edit(header: bytes) -> bytes:
        entries = json.loads(header)
        name = next(name for name in entries if name != "__metadata__")
        entry = entries[name] | fields
        entries[name] = {k: v for k, v in entry.items() if v is not None}
        return json.dumps(entries).encode()

    return edit_header(edit)


def norm(change: Callable[[mx.array], mx.array]) -> Edit:
    return edit_arrays(lambda arrays: arrays.update({NORM: change(arrays[NORM])}))


def index(place: Any) -> dict[str, Edit]:
    content = json.dumps({"weight_map": {"a": place}})
    return {"model__safetensors__index__json": write(content)}


def config(**fields: Any) -> dict[str, Edit]:
    return {"config__json": set_fields(**fields)}


CASES: dict[str, tuple[dict[str, Edit], str]] = {
    "deep config": ({"config__json": write(f'{{"a": {DEEP}}}')}, "JSON: it is nested too deeply"),
    "long number": ({"config__json": write(f'{{"a": {LONG}}}')}, "JSON: Exceeds the limit"),
    "deep settings": ({"tokenizer_config__json": write(f'{{"a": {DEEP}}}')}, "nested too deeply"),
    "deep tokenizer": ({"tokenizer__json": write(f'{{"a": {DEEP}}}')}, "nested too deeply"),
    "deep header": (
        {"model__safetensors": edit_header(lambda _: f'{{"a": {DEEP}}}'.encode())},
        "its header cannot be read: it is nested too deeply",
    ),
    "a million layers": (config(num_hidden_layers=10**6), "weights hold 11 arrays"),
    "a wide layer": (config(hidden_size=10**12), "hidden_size is 1000000000000, the weights"),
    "a wide vocabulary": (config(vocab_size=10**12), "vocab_size is 1000000000000, the weights"),
    "many heads": (config(num_attention_heads=10**9), "num_attention_heads is 1000000000"),
    "key heads do not divide": (config(num_key_value_heads=5), "cannot be loaded"),
    "an odd head": (config(head_dim=63), "cannot be loaded"),
    "no such quantization": (config(quantization={"bits": 7, "group_size": 64}), "bits in groups"),
    "quantization of a text": (config(quantization="yes"), "bits in groups of .* got yes"),
    "base of a text": (config(rope_theta="x"), "cannot be loaded"),
    "no such scaling": (config(rope_scaling={"type": "magic"}), "cannot be loaded: Unsupported"),
    "scaling of a list": (config(rope_scaling=[1]), r"rope_scaling must be an object, got \[1\]"),
    "scaling by a text": (
        config(rope_scaling={"type": "yarn", "factor": "4"}),
        "factor must be a number above 0, got '4'",
    ),
    "scaling backwards": (
        config(rope_scaling={"type": "yarn", "factor": -3.0}),
        "factor must be a number above 0, got -3.0",
    ),
    "scaling by no number": (
        config(rope_parameters={"full_attention": {"factor": float("nan")}}),
        "factor must be a number above 0, got nan",
    ),
    "scaling by what is not said": (
        config(rope_scaling={"type": "yarn"}),
        "cannot be loaded: its config.json lacks .*factor",
    ),
    "no heads": (config(num_attention_heads=0), "config.json holds a value that no such model has"),
    "end of a text": (config(eos_token_id="x"), "eos_token_id must be token ids, got x"),
    "kind of a number": (config(model_type=7), "model_type must be a text, got 7"),
    "places of text": (
        {"model__safetensors": first_entry(data_offsets=["a", "b"])},
        "embed_tokens.weight has no place",
    ),
    "one place": ({"model__safetensors": first_entry(data_offsets=[0])}, "has no place"),
    "no place": ({"model__safetensors": first_entry(data_offsets=None)}, "has no place"),
    "overlapping": ({"model__safetensors": first_entry(data_offsets=[8, 3145736])}, "is damaged"),
    "negative shape": ({"model__safetensors": first_entry(shape=[-1, 2])}, "has no shape"),
    "another shape": ({"model__safetensors": first_entry(shape=[7])}, "of shape .7., and has"),
    "whole numbers": ({"model__safetensors": norm(lambda x: x.astype(mx.int32))}, "is int32"),
    "complex": (
        {"model__safetensors": norm(lambda x: x.astype(mx.complex64))},
        "norm.weight is complex64",
    ),
    "bool": ({"model__safetensors": norm(lambda x: x > 0)}, "norm.weight is bool"),
    "shard of a number": (index(1), "the place of a must be a file's name, got 1"),
    "shard of nothing": (index(None), "the place of a must be a file's name, got None"),
    "shard of a list": (index(["a"]), "the place of a must be a file's name"),
    "shard elsewhere": (index("../x.safetensors"), "must be a file's name, got '../x"),
    "shard of no name": (index(""), "must be a file's name, got ''"),
    "shard of a whole path": (index("/x.safetensors"), "must be a file's name, got '/x"),
    "its own model": (config(model_file="evil.py"), "only with --trust-remote-code"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_model(refused: Run, tmp_path: Path, case: str) -> None:
    edits, message = CASES[case]
    folder = changed(SMALL, tmp_path / "model", **edits)
    sentence = refused(generate.main, "--model", folder, "--no-drafter")
    assert re.search(message, sentence), sentence
    assert len(sentence) <= 600


def test_a_tokenizers_code_does_not_run_and_nobody_is_asked(
    refused: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A `y` on stdin was enough once."""
    ran = tmp_path / "ran"
    settings = {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["evil_tokenizer.EvilTokenizer", None]},
    }
    folder = changed(SMALL, tmp_path / "model", tokenizer__json=delete)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil_tokenizer.py").write_text(f"open({str(ran)!r}, 'w')\nclass EvilTokenizer: ...")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(str(text)) or "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    sentence = refused(generate.main, "--model", folder, "--no-drafter")
    assert "only with --trust-remote-code" in sentence
    assert asked == []
    assert not ran.exists()


def test_stale_index_is_passed_over_as_mlx_lm_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(SMALL, tmp_path / "model", **index("model-00001-of-00002.safetensors"))
    flags = ["--model", str(folder), "--no-drafter", "--max-tokens", "2"]
    assert generate.main(flags) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no folder .* with adapters"),
        ({}, "holds no adapter_config.json"),
        ({"adapter_config.json": "[1]"}, "does not hold a JSON object"),
        ({"adapter_config.json": "{}"}, "adapters.safetensors is missing"),
    ],
)
def test_folders_of_no_adapters(
    refused: Run,
    tmp_path: Path,
    files: dict[str, str] | None,
    message: str,
) -> None:
    folder = tmp_path / "adapters"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    flags = ["--model", SMALL, "--no-drafter", "--adapter-path", folder]
    assert re.search(message, refused(generate.main, *flags))


@pytest.mark.parametrize("rank", ["eight", 10**12, -1, None])
def test_adapters_that_do_not_fit(refused: Run, tmp_path: Path, rank: Any) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    shape = {"rank": rank, "scale": 1.0, "dropout": 0.0}
    settings = {"num_layers": 1, "lora_parameters": shape}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x.lora_a": mx.zeros((2, 2))})
    flags = ["--model", SMALL, "--no-drafter", "--adapter-path", folder]
    assert "do not fit the model" in refused(generate.main, *flags)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 10,000"),
        ({"hidden_size": 10**12}, "hidden_size must be at most"),
        ({"vocab_size": 2**24, "hidden_size": 2**20}, "parameters, .* this machine has"),
    ],
)
def test_students_that_no_machine_holds(fields: dict[str, Any], message: str) -> None:
    known = json.loads((SMALL / "config.json").read_text())
    with pytest.raises(InputError, match=message):
        from_config(known | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + DEEP, "nested too deeply"),
        ("a: &a [1, *a]", "a value holds itself, line 1"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + MULTIPLYING,
            "its aliases stand for more than 100,000 values",
        ),
        ("a: [", "line 1|expected"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_hostile_yaml(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text)


def test_yaml_with_aliases_is_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", [f'{{"a": {DEEP}}}', f'{{"a": {LONG}}}', "[1]", "{"])
def test_rows_name_their_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{text}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: "):
        list(read_jsonl(path))
    path.write_text(text)
    with pytest.raises(InputError, match=r"rows.jsonl (cannot be read as JSON|does not hold)"):
        read_json(path)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "a\ud800b"])
def test_names_that_are_no_path(name: str) -> None:
    with pytest.raises(InputError, match=r"the model (has an empty name|.* cannot be a path)"):
        usable_path(name, "the model")


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/.."])
def test_outputs_that_are_no_new_place(name: str) -> None:
    with pytest.raises(InputError, match="the output"):
        output_path(name)


def test_a_file_whose_writing_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*names: Path) -> None:
        raise KeyboardInterrupt

    write_whole(tmp_path / "figures.json", "old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "figures.json", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("field x:\n  no bool", "field x: no bool"), ("a\nb", "a"), ("", "ValueError")],
)
def test_what_an_error_says_first(text: str, said: str) -> None:
    assert one_line(ValueError(text)) == said


def test_sentences_are_short_and_on_one_line() -> None:
    error = InputError("no " + "x" * 5_000 + "\n\x1b[31m end")
    assert len(str(error)) <= 600
    assert str(error).startswith("no xxx")
    assert str(error).endswith("\\n\\x1b[31m end")


# ---------------------------------------------------------------- what is no file, and never ends


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail, rather than wait for ever, where a pipe is opened."""

    def late(*_: object) -> None:
        raise TimeoutError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


def in_place_of(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    NO_FILES[kind](path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_no_file_in_a_models_folder(refused: Run, tmp_path: Path, name: str, kind: str) -> None:
    folder = changed(SMALL, tmp_path / "model")
    in_place_of(folder / name, kind)
    sentence = refused(generate.main, "--model", folder, "--no-drafter", "--max-tokens", "1")
    assert name in sentence


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_no_file_as_data(tmp_path: Path, name: str, kind: str) -> None:
    in_place_of(tmp_path / name, kind)
    with pytest.raises(InputError, match=re.escape(name)):
        list(read_rows(tmp_path / name))


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", NO_FILES)
def test_no_file_as_a_config(tmp_path: Path, kind: str) -> None:
    in_place_of(tmp_path / "a.yaml", kind)
    with pytest.raises(InputError, match=r"a\.yaml cannot be read"):
        read_yaml(tmp_path / "a.yaml", {}, {})


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.npz"])
def test_no_file_as_answers(tmp_path: Path, name: str, kind: str) -> None:
    in_place_of(tmp_path / name, kind)
    with pytest.raises(InputError, match=re.escape(name)):
        check_material(tmp_path / name)
