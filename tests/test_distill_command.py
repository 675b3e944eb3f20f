"""``distill`` from its arguments to its last line: what it makes, survives, and refuses."""

import csv
import errno
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import yaml
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill import cli, machine
from mlx_distill.checkpoint import bundled, load
from mlx_distill.data.encoding import read_texts
from mlx_distill.data.selection import fit
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.students import from_config
from mlx_distill.evaluation.texts import evaluate
from mlx_distill.hashes import tokenizer_hash

# The package has a function of that name, too.
command = importlib.import_module("mlx_distill.distill")
main = command.main

STORIES = [
    "Once upon a time there was a little dog. It ran to the park.",
    "Ben had a red kite. It flew high.",
    "Lily found a needle in her room. She gave it to mom.",
    "The cat sat on the mat and slept all day long.",
    "Tom and Sue went to the sea. They saw a big fish.",
    "A bird sang in the tree.",
    "One day it rained. The frog was happy.",
    "Mom made soup. It was hot, so they waited.",
    "The sun was warm. Max played with a ball.",
    "There was a cow named Moo. She liked grass.",
    "Anna lost her hat. A boy found it.",
    "The old man had a small boat.",
]
HELD_OUT = ["The dog had a ball. It was red.", "Lily and Ben went home.", "It was a sunny day."]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
TINY = LLAMA | {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
STEPS = ["--steps", "6", "--checkpoint-every", "2", "--evaluate-every", "3", "--quiet"]
SIZES = ["--batch-size", "3", "--learning-rate", "0.01", "--seed", "4"]
FILES = {"config.json", "model.safetensors", "tokenizer_config.json", "README.md", "config.yaml"}
FILES |= {"training.json", "log.jsonl", "log.csv", "curves.png"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The hub's client reads the environment only once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as all else; the curves of ``finished``, made before, are real ones."""
    draw: Any = lambda rows, path, title: path.write_bytes(b"")  # noqa: E731
    monkeypatch.setattr("mlx_distill.distillation.run.draw_curves", draw)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, config: dict[str, Any], seed: int, tokenizer: Any) -> Path:
    """Write a model of random weights that are wide enough for clear distributions."""
    model = from_config(config, seed)
    model.update(tree_map(lambda x: 3 * x if x.ndim > 1 else x, model.parameters()))
    own = compact(model, config, ExportConfig("float32"))
    export(folder, model, own, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


def byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return a folder with teachers, a student's configuration, a student, and texts."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "teacher", LLAMA, 1, tokenizer)
    save(folder / "second", LLAMA, 2, tokenizer)
    save(folder / "bytes", LLAMA | {"vocab_size": 258}, 1, byte_tokenizer())
    save(folder / "student", TINY, 3, tokenizer)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    write_rows(folder / "texts" / "train.jsonl", [{"text": text} for text in STORIES])
    write_rows(folder / "texts" / "valid.jsonl", [{"text": text} for text in HELD_OUT])
    return folder


def arguments(world: Path, output: Path, *more: Any) -> list[str]:
    common = ["--teacher", world / "teacher", "--student-config", world / "tiny.json"]
    rest = ["--data", world / "texts", "--output", output, *SIZES, *STEPS, *more]
    return [str(argument) for argument in [*common, *rest]]


def learn(world: Path, output: Path, *more: Any) -> Path:
    """Distil; return the student's folder."""
    assert main(arguments(world, output, *more)) == 0
    assert not output.with_name(output.name + ".partial").exists()
    return output


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student whose training was never stopped."""
    return learn(world, tmp_path_factory.mktemp("finished") / "student")


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(set(row.pop("measured")) == {"tokens_per_second", "peak_memory_gb"} for row in rows)
    return rows


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def arrays_of(folder: Path) -> dict[str, Any]:
    model = mlx_lm.load(str(folder))[0]
    return dict(tree_flatten(model.parameters()))


def same_result(one: Path, other: Path) -> bool:
    return weights_of(one) == weights_of(other) and log_of(one) == log_of(other)


Refuse = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return what runs a command that has to refuse, and returns the sentence."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        _, err = capsys.readouterr()
        lines = err.replace("\r", "\n").strip().splitlines()
        assert "Traceback" not in err
        assert lines[-1].startswith("error: "), err
        assert sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1].removeprefix("error: ")

    return run


def without(argv: list[str], flag: str, count: int = 1) -> list[str]:
    at = argv.index(flag)
    return argv[:at] + argv[at + 1 + count :]


# -------------------------------------------------------------------------------------- end to end


def test_student_of_flags(
    world: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {path.name: path.read_bytes() for path in (world / "teacher").iterdir()}
    output = learn(world, tmp_path / "deep" / "student")
    out, err = capsys.readouterr()
    for when in ("before", "after"):
        assert re.search(rf"  {when}: nats \d.*, kl \d.*, agreement 0\.\d+, perplexity \d", out)
    assert re.search(r"memory: about \d.* \(teachers .* student .* a batch of 3 x \d+ tokens", err)
    assert {path.name for path in output.iterdir()} >= FILES
    assert {path.name for path in output.parent.iterdir()} == {"student"}
    assert {path.name: path.read_bytes() for path in (world / "teacher").iterdir()} == teacher
    model, again = mlx_lm.load(str(output))[:2]
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert model.args.hidden_size == 32
    count = sum(x.size for x in arrays_of(output).values())
    assert f"{count:,} parameters" in out
    log = log_of(output)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in log if "held_out" in row] == [3, 6]
    assert all(row["loss"] == row["forward_kl"] for row in log)
    run = json.loads((output / "training.json").read_text())
    assert run["held_out"]["after"] == log[-1]["held_out"]
    assert run["held_out"]["before"]["kl"] > 1.1 * log[-1]["held_out"]["kl"]
    assert run["texts"] == {
        **{"rows": 12, "kept": 12, "dropped": {}, "changed": {}},
        "held_out": {"rows": 3, "kept": 3, "dropped": {}, "changed": {}},
        "learned_tokens": 149,
    }
    assert run["seed"] == 4
    assert {"python", "mlx", "mlx-lm", "mlx-distill"} <= set(run["versions"])
    assert run["config"]["training"]["steps"] == 6
    card = (output / "README.md").read_text()
    for part in (
        f"{count:,} parameters",
        "Teacher: teacher",
        "forward_kl",
        "Data: texts: 12 texts of 12 rows",
    ):
        assert part in card
    assert f" | {log[-1]['held_out']['kl']:.4f} |" in card


def test_log_as_a_table_and_as_curves(finished: Path) -> None:
    log = log_of(finished)
    with (finished / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["step", "loss", "count", "learning_rate", "forward_kl"]
    held_out = ["held_out_nats", "held_out_kl", "held_out_agreement", "held_out_perplexity"]
    assert list(rows[0]) == [*columns, *held_out]
    assert [int(row["step"]) for row in rows] == [row["step"] for row in log]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in log]
    assert rows[0]["held_out_kl"] == ""
    assert float(rows[5]["held_out_kl"]) == log[5]["held_out"]["kl"]
    picture = (finished / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1800, 480)


def test_student_learns_from_the_bundled_teacher(world: Path, tmp_path: Path) -> None:
    argv = [
        *arguments(world, tmp_path / "student", "--teacher", bundled("stories-14m")),
        *("--steps", "18", "--evaluate-every", "6", "--checkpoint-every", "18"),
        *("--loss", "forward_kl:weight=0.9", "hard:weight=0.1"),
    ]
    assert main(argv) == 0
    log = log_of(tmp_path / "student")
    kl = [row["held_out"]["kl"] for row in log if "held_out" in row]
    assert kl[-1] < 0.8 * log[0]["forward_kl"]
    assert kl == sorted(kl, reverse=True)


def test_command_is_a_verb_too(world: Path, tmp_path: Path, finished: Path) -> None:
    assert cli.main(["distill", *arguments(world, tmp_path / "student")]) == 0
    assert same_result(tmp_path / "student", finished)


def test_progress_is_shown(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(world, tmp_path / "student")
    argv.remove("--quiet")
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "6/6" in err
    assert re.search(r"forward_kl \d\.\d{3}", err)
    assert re.search(r"held out: nats \d\.\d{3} kl \d", err)


def test_module_is_the_function_too() -> None:
    import mlx_distill

    with pytest.raises(mlx_distill.InputError, match="there are no texts"):
        command(nn.Linear(1, 1), None, [], folder="unused-folder")


# ------------------------------------------------------------------------------------ YAML


def write_yaml(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_options_of_a_file(world: Path, tmp_path: Path, finished: Path) -> None:
    values = {
        "teacher": str(world / "teacher"),
        "student_config": str(world / "tiny.json"),
        "data": [str(world / "texts")],
        "output": str(tmp_path / "student"),
        "loss": [{"name": "forward_kl", "weight": 1}],
        "batch_size": 3,
        "seed": 4,
        "steps": 6,
        "checkpoint_every": 2,
        "evaluate_every": 3,
        "quiet": True,
        "max_texts": None,
    }
    # As one writes it by hand; YAML takes it for a text.
    text = yaml.safe_dump(values) + "learning_rate: 1e-2\n"
    path = write_yaml(tmp_path / "run.yaml", text)
    assert main(["--config", str(path)]) == 0
    assert same_result(tmp_path / "student", finished)


def test_flags_win_over_the_file(world: Path, tmp_path: Path, finished: Path) -> None:
    values = {"steps": 99, "seed": 99, "loss": "hard", "data": "nowhere", "quiet": False}
    path = write_yaml(tmp_path / "run.yaml", values | {"checkpoint_every": 1, "pack": True})
    flags = ["--config", str(path), "--loss", "forward_kl", "--no-pack"]
    output = learn(world, tmp_path / "student", *flags)
    assert same_result(output, finished)
    used = yaml.safe_load((output / "config.yaml").read_text())
    assert (used["steps"], used["seed"], used["checkpoint_every"]) == (6, 4, 2)
    assert used["loss"] == ["forward_kl"]
    assert used["pack"] is False


def test_what_was_used_can_be_used_again(world: Path, tmp_path: Path) -> None:
    more = ["--loss", "forward_kl:weight=0.123456789,temperature=2", "hidden_mse:layers=-1--1"]
    first = learn(world, tmp_path / "first", *more, "--export-dtype", "float32")
    argv = ["--config", str(first / "config.yaml"), "--output", str(tmp_path / "second")]
    assert main([*argv, "--quiet"]) == 0
    assert same_result(tmp_path / "second", first)
    assert (tmp_path / "second" / "config.yaml").read_text() == (first / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stpes": 3}, "has an unknown field stpes"),
        ({"config": "other.yaml"}, "has an unknown field config"),
        ({"training": {"steps": 3}}, "has an unknown field training"),
        ({1: 2}, "has an unknown field 1"),
        ({"steps": "many"}, "steps is 'many', expected int"),
        ({"steps": 2.5}, "steps is 2.5, expected int"),
        ({"steps": True}, "steps is True, expected int"),
        ({"steps": None}, "steps is None, expected int"),
        ({"steps": [1]}, "steps is [1], expected int"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected float"),
        ({"learning_rate": True}, "learning_rate is True, expected float"),
        ({"pack": 1}, "pack is 1, expected bool"),
        ({"pack": "yes please"}, "pack is 'yes please', expected bool"),
        ({"resume": "no"}, "resume is 'no', expected bool"),
        ({"long": 3}, "long is 3, expected str"),
        ({"output": 3}, "output is 3, expected str"),
        ({"max_texts": "few"}, "max_texts is 'few', expected int"),
        ({"max_texts": [3]}, "max_texts is [3], expected int"),
        ({"student_layers": ["first"]}, "student_layers is 'first', expected int"),
        ({"student_layers": "0 2"}, "student_layers is '0 2', expected int"),
        ({"teacher_weights": ["much", 1]}, "teacher_weights is 'much', expected float"),
        ({"data": [1]}, "data is 1, expected str"),
        ({"data": {"a": "b"}}, "data is {'a': 'b'}, expected str"),
        ({"loss": [1]}, "loss is 1, expected str"),
        ("[1, 2]", "does not hold names and values"),
        ("", "does not hold names and values"),
        ("a: [", "cannot be read: "),
    ],
)
def test_files_of_options_that_cannot_be(
    world: Path, tmp_path: Path, refused: Refuse, values: Any, sentence: str
) -> None:
    path = write_yaml(tmp_path / "run.yaml", values)
    argv = [*arguments(world, tmp_path / "student"), "--config", str(path)]
    found = refused(argv)
    assert found.startswith(f"the config {path}")
    assert sentence in found
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]


def test_file_of_options_that_is_not_there(world: Path, tmp_path: Path, refused: Refuse) -> None:
    argv = [*arguments(world, tmp_path / "student"), "--config", str(tmp_path / "no.yaml")]
    assert "no.yaml cannot be read: " in refused(argv)


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        ({"name": "forwad_kl"}, "there is no loss forwad_kl; there are hard, forward_kl, "),
        ({"weight": 1}, "a loss needs a name, got {'weight': 1}"),
        ({"name": "hard", "wieght": 1}, "hard has no option wieght; it has weight"),
    ],
)
def test_losses_of_a_file_that_cannot_be(
    world: Path, tmp_path: Path, refused: Refuse, term: dict[str, Any], sentence: str
) -> None:
    path = write_yaml(tmp_path / "run.yaml", {"loss": [term]})
    argv = ["--config", str(path), "--data", str(world / "texts")]
    assert sentence in refused(argv)


# -------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--held-out 0", "held_out must be at least 1, got 0"),
        ("--cache-k 0", "cache_k must be at least 1, got 0"),
        ("--max-length 1", "max_length must be at least 2, got 1"),
        ("--max-texts 0", "max_texts must be at least 1, got 0"),
        ("--long keep", "long must be cut, drop or refuse, got keep"),
        ("--data-layout tables", "data_layout must be texts or completions, got tables"),
        ("--teacher-mean mode", "teacher_mean must be probs or logits, got mode"),
        ("--export-dtype float8", "export_dtype must be float16, bfloat16 or float32, got"),
        ("--teacher-bits 7", "teacher_bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ("--export-bits 1", "export_bits must be 2, 3, 4, 5, 6 or 8, got 1"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--learning-rate 0", "learning_rate must be above 0 and at most 1,000, got 0.0"),
        ("--fine-tune some", "fine_tune must be full, lora or dora, got some"),
        ("--on-policy 2", "on_policy must be between 0 and 1, got 2.0"),
        ("--min-answer-chars 0", "min_answer_chars must be at least 1, got 0"),
        ("--student S", "student, student_config and student_layers exclude each other"),
        ("--student-layers 0", "student, student_config and student_layers exclude each other"),
        ("--loss forwad_kl", "there is no loss forwad_kl; there are hard, forward_kl, reverse_kl"),
        ("--loss forward_kl:temp=2", "forward_kl has no option temp; it has scaled, temperature"),
        ("--loss jensen_shannon:beta=2", "jensen_shannon: beta must be between 0 and 1, got 2"),
        ("--loss hidden_mse:layers=0-3", "there is no layer 3: Model has 3, 0 to 2"),
        ("--loss hidden_mse:layers=1-0", "there is no layer 1: Model has 1, 0 to 0"),
        ("--teacher-weights 1 2", "2 weights do not fit 1 teachers"),
        ("--teacher-weights 0", "teacher_weights must be above 0 and at most 1,000,000, got 0.0"),
        ("--report-to carrier-pigeon", "--report-to: carrier-pigeon callback doesn't exist"),
        ("--teacher nowhere", "there is no folder nowhere"),
        ("--student-config nowhere.json", "the config nowhere.json cannot be read as JSON: "),
        ("--tokenizer nowhere", "there is no folder nowhere"),
        ("--data nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("--valid nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("--resume", "there is nothing to resume: "),
        ("--lora-rank 0", "lora_rank must be at least 1, got 0"),
        ("--fine-tune lora --lora-layers 2", "lora_layers is 2, the student has 1"),
        ("--use-cache C --on-policy 0.5", "a cache does not know what the student will write"),
        (
            "--use-cache C --loss forward_kl",
            "forward_kl needs all of the teacher's logits, and a cache has the top ",
        ),
        ("--use-cache C", "C holds no manifest.json, so it is no teacher's cache"),
    ],
)
def test_arguments_that_cannot_be(
    world: Path, tmp_path: Path, refused: Refuse, flags: str, sentence: str
) -> None:
    """Whatever is refused, nothing is left behind that would be in the way of a better try."""
    assert sentence in refused(arguments(world, tmp_path / "student", *flags.split()))
    assert not [path.name for path in tmp_path.iterdir() if path.name != "hub"]


@pytest.mark.parametrize(
    ("missing", "count", "more", "sentence"),
    [
        ("--data", 1, "", "there is no data; name it with --data"),
        ("--output", 1, "", "name the student's folder with --output"),
        (
            "--teacher",
            1,
            "--loss forward_kl",
            "forward_kl needs a teacher; name one with --teacher, or use ",
        ),
        ("--teacher", 1, "--loss hard", "a new student without a teacher needs a tokenizer; use -"),
        (
            "--teacher",
            1,
            "--cache-teacher C --loss hard",
            "a cache holds one teacher's answers",
        ),
        ("--student-config", 1, "", "there is no student; name one with --student, --student-co"),
    ],
)
def test_arguments_that_are_missing(
    world: Path, tmp_path: Path, refused: Refuse, missing: str, count: int, more: str, sentence: str
) -> None:
    argv = arguments(world, tmp_path / "student", *more.split())
    assert sentence in refused(without(argv, missing, count))
    assert not list(tmp_path.iterdir())


def test_layers_of_no_teacher(world: Path, tmp_path: Path, refused: Refuse) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    argv = [*without(argv, "--teacher"), "--loss", "hard", "--student-layers", "0"]
    assert "a student of the teacher's layers needs a teacher" in refused(argv)


def test_layer_that_the_teacher_does_not_have(world: Path, tmp_path: Path, refused: Refuse) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    sentence = refused([*argv, "--student-layers", "0", "3"])
    assert sentence == "there is no layer 3: the teacher has 3, 0 to 2"


def test_tokenizer_that_cannot_be_loaded(world: Path, tmp_path: Path, refused: Refuse) -> None:
    (tmp_path / "empty").mkdir()
    argv = arguments(world, tmp_path / "student", "--tokenizer", tmp_path / "empty")
    assert f"the tokenizer {tmp_path / 'empty'} cannot be loaded: " in refused(argv)


def test_student_that_does_not_know_the_tokens(
    world: Path, tmp_path: Path, refused: Refuse
) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps(TINY | {"vocab_size": 300}))
    argv = arguments(world, tmp_path / "student", "--student-config", tmp_path / "narrow.json")
    assert re.match(r"the texts hold token \d+, but a Model of 300 tokens is to", refused(argv))
    assert {path.name for path in tmp_path.iterdir()} == {"narrow.json"}


def test_service_that_is_not_installed(
    world: Path, tmp_path: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", None)
    argv = arguments(world, tmp_path / "student", "--report-to", "wandb")
    assert refused(argv).startswith("--report-to: ")
    assert not list(tmp_path.iterdir())


def test_output_that_exists(world: Path, tmp_path: Path, refused: Refuse) -> None:
    output = tmp_path / "student"
    output.mkdir()
    argv = arguments(world, output)
    assert refused(argv) == f"the output {output} exists; name another, or remove it"
    assert refused([*argv, "--resume"]) == f"the output {output} exists; name another, or remove it"
    output.rename(tmp_path / "student.partial")
    sentence = f"{output}.partial holds an unfinished training; add --resume, or remove it"
    assert refused(argv) == sentence


def test_memory_is_estimated_before_anything_is_written(
    world: Path, tmp_path: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 5_000_000)
    sentence = refused(arguments(world, tmp_path / "student"))
    assert re.match(
        r"memory: about 0\.\d\d GB \(teachers 0\.\d\d, student 0\.\d\d, gradients and optimizer "
        r"0\.\d\d, a batch of 3 x \d+ tokens 0\.\d\d\), but this machine has 0\.0 GB; use a "
        r"smaller --batch-size with --accumulate, --grad-checkpoint, or adapters \(--fine-tune",
        sentence,
    )
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- data


def test_empty_data(world: Path, tmp_path: Path, refused: Refuse) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    argv = arguments(world, tmp_path / "student", "--data", empty)
    assert refused(argv) == f"{empty} holds no texts"
    assert f"{empty} leaves no completions of 0 rows: empty" in refused(
        [*argv, "--data-layout", "completions"]
    )


def test_too_few_texts_to_hold_some_out(world: Path, tmp_path: Path, refused: Refuse) -> None:
    data = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in STORIES[:5]])
    argv = arguments(world, tmp_path / "student", "--data", data)
    assert refused(argv) == "5 texts are too few: 64 are held out"
    assert refused([*argv, "--held-out", "5"]) == "5 texts are too few: 5 are held out"


def test_held_out_texts_are_chosen_by_a_seed_of_their_own(world: Path, tmp_path: Path) -> None:
    parts = [
        write_rows(tmp_path / f"{n}.jsonl", [{"text": t} for t in STORIES[n::2]]) for n in (0, 1)
    ]
    options = ["--data", *parts, "--held-out", "4"]
    before = []
    for name, seeds in (("1", []), ("2", ["--seed", "5"]), ("3", ["--held-out-seed", "1"])):
        output = tmp_path / name
        argv = arguments(world, output, *options, "--student-layers", "0", *seeds)
        assert main(without(argv, "--student-config")) == 0
        run = json.loads((output / "training.json").read_text())
        assert run["texts"]["held_out"]["kept"] == 4
        assert run["texts"]["kept"] == 8
        before.append(run["held_out"]["before"]["nats"])
    assert before[0] == before[1] != before[2]


def test_home_folder_of_a_file(
    world: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands the tilde, a file of options does not; valid.jsonl is found all the same."""
    monkeypatch.setenv("HOME", str(world))
    path = write_yaml(tmp_path / "run.yaml", {"data": "~/texts"})
    argv = [*without(arguments(world, tmp_path / "student"), "--data"), "--config", str(path)]
    assert main(argv) == 0
    assert same_result(tmp_path / "student", finished)


def test_bad_rows_are_named(world: Path, tmp_path: Path, refused: Refuse) -> None:
    data = write_rows(tmp_path / "bad.jsonl", [{"text": "A dog."}, {"story": "A cat."}])
    sentence = refused(arguments(world, tmp_path / "student", "--data", data))
    assert sentence == (
        f"{data}, line 2: expected text, prompt and completion, or messages, got ['story']"
    )


@pytest.mark.parametrize(("long", "kept"), [("cut", 12), ("drop", 4)])
def test_long_texts_are_counted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], long: str, kept: int
) -> None:
    output = learn(world, tmp_path / "student", "--max-length", "12", "--long", long)
    what, done = ("changed", "cut to") if long == "cut" else ("dropped", "longer than")
    err = capsys.readouterr().err
    assert f"12 rows read, {kept} texts kept, {12 - kept} dropped\n8 {done} 12 tokens: " in err
    counts = json.loads((output / "training.json").read_text())["texts"]
    assert (counts["rows"], counts["kept"]) == (12, kept)
    assert counts[what][f"{done} 12 tokens"]["count"] == 8
    assert f"{kept} texts of 12 rows (8 {done} 12 tokens)" in (output / "README.md").read_text()
    per_epoch = math.ceil(kept / 3)
    assert sum(row["count"] for row in log_of(output)[:per_epoch]) <= kept * 11


def test_long_texts_are_refused(world: Path, tmp_path: Path, refused: Refuse) -> None:
    argv = arguments(world, tmp_path / "student", "--max-length", "12", "--long", "refuse")
    assert refused(argv) == (
        "8 of 12 texts are longer than 12 tokens; cut or drop them with --long, or raise "
        "--max-length"
    )
    argv = arguments(world, tmp_path / "student", "--max-length", "2", "--long", "drop")
    assert refused(argv).startswith("none of 12 texts has anything to learn: ")


def test_packed_texts(world: Path, tmp_path: Path, tokenizer: Any) -> None:
    output = learn(world, tmp_path / "student", "--pack", "--max-length", "33", "--batch-size", "2")
    stream = [
        token for text in STORIES for token in [*tokenizer.encode(text), tokenizer.eos_token_id]
    ]
    num_rows = math.ceil((len(stream) - 1) / 32)  # a row begins with the last token of another
    per_epoch = math.ceil(num_rows / 2)
    counts = [row["count"] for row in log_of(output)]
    assert sum(counts[:per_epoch]) == len(stream) - len(STORIES)  # no text's first is learned


def test_answers_alone_are_learned(world: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": text[:10], "completion": text[10:]} for text in STORIES]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    options = ["--data", data, "--valid", world / "texts" / "valid.jsonl"]
    counts = []
    for name, flags in (("answers", []), ("all", ["--learn-prompts"])):
        output = learn(world, tmp_path / name, *options, *flags)
        counts.append(sum(row["count"] for row in log_of(output)[:4]))
    prompts = sum(len(tokenizer.encode(row["prompt"])) - 1 for row in rows)
    assert counts[1] - counts[0] == prompts
    answers = sum(
        len(tokenizer.encode(row["completion"], add_special_tokens=False)) + 1 for row in rows
    )
    assert counts[0] == answers


def test_stored_completions(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"input": text[:10], "output": text[10:]} for text in STORIES]
    bad = [
        {"input": "Hi", "output": "I'm sorry, but I cannot help with that."},
        {"input": "Hi"},
        good[0],
        {"story": "A cat."},
    ]
    data = write_rows(tmp_path / "stored.jsonl", [*good, *bad])
    valid = write_rows(tmp_path / "valid.jsonl", good[:3])
    more = ["--data", data, "--valid", valid, "--data-layout", "completions", "--loss", "hard"]
    argv = arguments(world, tmp_path / "student", *more, "--tokenizer", world / "teacher")
    assert main(without(argv, "--teacher")) == 0
    err = capsys.readouterr().err
    assert "16 rows read, 12 texts kept, 4 dropped" in err
    assert f"1 refusal: {data}, line 13" in err
    assert f"1 duplicate: {data}, line 15" in err
    assert f"2 unknown layout: {data}, line 14; {data}, line 16" in err
    assert "3 rows read, 3 held-out texts kept, 0 dropped" in err
    run = json.loads((tmp_path / "student" / "training.json").read_text())
    assert run["texts"]["kept"] == 12
    assert set(run["held_out"]["after"]) == {"nats", "perplexity"}
    assert "Teacher: stored text only" in (tmp_path / "student" / "README.md").read_text()


def test_stored_completions_are_filtered(
    world: Path, tmp_path: Path, refused: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"input": text[:10], "output": text[10:], "metadata": {"score": str(number)}}
        for number, text in enumerate(STORIES)
    ]
    data = write_rows(tmp_path / "data" / "train.jsonl", rows).parent
    write_rows(tmp_path / "data" / "valid.jsonl", rows[-2:])
    more = ["--data", data, "--data-layout", "completions", "--where", "score >= 6"]
    output = learn(world, tmp_path / "student", *more)
    assert "12 rows read, 6 texts kept, 6 dropped" in capsys.readouterr().err
    assert json.loads((output / "training.json").read_text())["texts"]["kept"] == 6
    argv = arguments(world, tmp_path / "none", *more[:-1], "score >= 60")
    assert "leaves no completions of 12 rows: 12 where is false" in refused(argv)
    argv = arguments(world, tmp_path / "none", *more[:-1], "open('x')")
    assert "where" in refused(argv)


# --------------------------------------------------------------------------------------- students


def test_student_of_the_teachers_layers(world: Path, tmp_path: Path) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    assert main([*argv, "--student-layers", "0", "2", "--learning-rate", "1e-6"]) == 0
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    theirs, ours = arrays_of(world / "teacher"), arrays_of(tmp_path / "student")
    for name, x in ours.items():
        source = name.replace("layers.1.", "layers.2.")
        np.testing.assert_allclose(x.astype(mx.float32), theirs[source], atol=2e-3, err_msg=name)


def test_student_that_exists_already(world: Path, tmp_path: Path) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    assert main([*argv, "--student", str(world / "student"), "--learning-rate", "1e-6"]) == 0
    theirs, ours = arrays_of(world / "student"), arrays_of(tmp_path / "student")
    assert set(theirs) == set(ours)
    for name, x in ours.items():
        np.testing.assert_allclose(x.astype(mx.float32), theirs[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(world: Path, tmp_path: Path, kind: str) -> None:
    """The seed decides their first weights, whatever ran before; the base is what it was."""
    base = ["--student", str(world / "student"), "--fine-tune", kind, "--lora-rank", "2"]
    for name in ("first", "second"):
        mx.random.seed(len(name))
        argv = without(arguments(world, tmp_path / name), "--student-config")
        assert main([*argv, *base, "--export-dtype", "float32"]) == 0
    assert same_result(tmp_path / "first", tmp_path / "second")
    before, after = arrays_of(world / "student"), arrays_of(tmp_path / "first")
    assert {name: x.shape for name, x in after.items()} == {n: x.shape for n, x in before.items()}
    kept = {name for name, x in after.items() if mx.array_equal(x, before[name]).item()}
    assert {name for name in before if "_proj" not in name} <= kept
    assert not any("_proj" in name for name in kept)
    count = sum(x.size for x in before.values())
    assert f"{count:,} parameters" in (tmp_path / "first" / "README.md").read_text()


def test_activations_computed_twice(world: Path, tmp_path: Path, finished: Path) -> None:
    more = ["--grad-checkpoint", "--on-policy", "0"]
    output = learn(world, tmp_path / "student", *more)
    for ours, theirs in zip(log_of(output), log_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, x in arrays_of(finished).items():
        np.testing.assert_allclose(arrays_of(output)[name], x, atol=5e-3, err_msg=name)


@pytest.mark.parametrize("more", [[], ["--grad-checkpoint"], ["--fine-tune", "lora"]])
def test_student_learns_from_its_own_texts(world: Path, tmp_path: Path, more: list[str]) -> None:
    sets = ["--rollout-every", "3", "--rollout-texts", "4", "--rollout-max-tokens", "5"]
    output = learn(world, tmp_path / "student", "--on-policy", "0.7", *sets, *more)
    assert all(math.isfinite(row["loss"]) for row in log_of(output))
    again = learn(world, tmp_path / "again", "--on-policy", "0.7", *sets, *more)
    assert same_result(output, again)


def test_quantised_teacher_and_export(world: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps(TINY | {"hidden_size": 64}))
    more = ["--teacher-bits", "8", "--export-bits", "4"]
    output = learn(world, tmp_path / "student", *more, "--student-config", tmp_path / "wide.json")
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    model, tokenizer = mlx_lm.load(str(output))[:2]
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    figures = json.loads((output / "training.json").read_text())["held_out"]
    assert list(figures) == ["before", "trained", "after"]
    assert "| | before | trained | after |" in (output / "README.md").read_text()
    valid, _ = fit(read_texts(world / "texts" / "valid.jsonl", tokenizer), 512)
    expected = evaluate({"student": model}, valid)["student"]
    nats = expected["nats"].sum() / expected["tokens"].sum()
    assert figures["after"]["nats"] == pytest.approx(nats, rel=1e-3)
    assert figures["trained"]["nats"] != figures["after"]["nats"]


def test_several_teachers(world: Path, tmp_path: Path, finished: Path) -> None:
    both = ["--teacher", world / "teacher", world / "second"]
    mean = learn(world, tmp_path / "mean", *both)
    assert log_of(mean)[0]["loss"] != log_of(finished)[0]["loss"]
    logits = learn(world, tmp_path / "logits", *both, "--teacher-mean", "logits")
    assert log_of(logits)[0]["loss"] != log_of(mean)[0]["loss"]
    one = learn(world, tmp_path / "one", *both, "--teacher-weights", "1", "1e-9")
    assert log_of(one)[0]["loss"] == pytest.approx(log_of(finished)[0]["loss"], rel=1e-4)
    assert "Teacher: teacher, second" in (mean / "README.md").read_text()


def test_features_and_relations(world: Path, tmp_path: Path) -> None:
    losses = ["forward_kl", "hidden_mse:layers=0-2", "similarity_preserving:weight=10"]
    output = learn(world, tmp_path / "student", "--loss", *losses)
    row = log_of(output)[-1]
    parts = row["forward_kl"] + row["hidden_mse"] + 10 * row["similarity_preserving"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert not any("projection" in name for name in mx.load(str(output / "model.safetensors")))


# ------------------------------------------------------------------------------- another tokenizer


@pytest.mark.parametrize("teachers", [["bytes"], ["teacher", "bytes"], ["bytes", "teacher"]])
def test_other_tokenizer_names_both_ways_out(
    world: Path, tmp_path: Path, refused: Refuse, teachers: list[str]
) -> None:
    argv = arguments(world, tmp_path / "student", "--student", world / "student")
    argv = without(argv, "--student-config")
    sentence = refused([*argv, "--teacher", *(str(world / name) for name in teachers)])
    assert sentence == (
        "the teacher's tokenizer is not the student's, so their tokens cannot be compared one by "
        "one; compare sorted probabilities with --loss sorted_l1 (ULD), or learn from the "
        "teacher's text alone: --loss hard, on data that it wrote"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("losses", [["sorted_l1", "hard:weight=0.1"], ["hard"]])
def test_both_ways_out_of_another_tokenizer(world: Path, tmp_path: Path, losses: list[str]) -> None:
    argv = arguments(world, tmp_path / "student", "--teacher", world / "bytes", "--loss", *losses)
    argv = [*without(argv, "--student-config"), "--student", str(world / "student")]
    assert main(argv) == 0
    log = log_of(tmp_path / "student")
    assert all(math.isfinite(row["loss"]) for row in log)
    assert set(log[-1]["held_out"]) == {"nats", "perplexity"}


# ------------------------------------------------------------------------------ the teacher's cache


def cache(world: Path, folder: Path, *more: Any) -> int:
    argv = without(arguments(world, folder, *more), "--output")
    return main([*argv, "--cache-teacher", str(folder)])


@pytest.fixture(scope="module")
def cached(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "cache"
    assert cache(world, folder, "--cache-k", "32") == 0
    return folder


def use(world: Path, folder: Path, output: Path, *more: Any) -> list[str]:
    argv = arguments(world, output, "--use-cache", folder, "--loss", "sparse_kl", *more)
    return argv


def test_cached_teacher(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    folder = tmp_path / "deep" / "cache"
    assert cache(world, folder, "--cache-k", "4096") == 0
    out = capsys.readouterr().out
    assert re.search(r"cache: 12 texts, \d+ bytes per token", out)
    assert not [path for path in tmp_path.iterdir() if path.name != "deep"]
    assert main(use(world, folder, tmp_path / "student")) == 0
    losses = [[row["loss"] for row in log_of(path)] for path in (tmp_path / "student", finished)]
    np.testing.assert_allclose(*losses, rtol=5e-3)  # all tokens, in half precision
    assert set(log_of(tmp_path / "student")[-1]["held_out"]) == {
        "nats",
        "kl",
        "agreement",
        "perplexity",
    }


def test_cache_without_its_teacher(world: Path, tmp_path: Path, cached: Path) -> None:
    """Teacher and student need not be in memory together."""
    argv = use(world, cached, tmp_path / "student", "--tokenizer", world / "teacher")
    assert main(without(argv, "--teacher")) == 0
    log = log_of(tmp_path / "student")
    assert set(log[-1]["held_out"]) == {"nats", "perplexity"}
    assert main(use(world, cached, tmp_path / "judged")) == 0
    assert weights_of(tmp_path / "judged") == weights_of(tmp_path / "student")


def test_caching_again_does_nothing_more(
    world: Path, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")}
    capsys.readouterr()
    assert cache(world, cached, "--cache-k", "32") == 0
    assert {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")} == before
    assert before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--max-texts", "11"],
            "was made of other texts, or of the same ones cut, marked or ordered",
        ),
        (
            ["--max-length", "9"],
            "was made of other texts, or of the same ones cut, marked or ordered",
        ),
        (
            ["--pack"],
            "was made of other texts, or of the same ones cut, marked or ordered otherwise",
        ),
        (["--loss", "sparse_kl:k=33"], "sparse_kl asks for 33 tokens per position, the cache has"),
        (["--loss", "sparse_kl", "hidden_mse"], "hidden_mse compares features, so it needs a live"),
    ],
)
def test_cache_of_something_else(
    world: Path, tmp_path: Path, refused: Refuse, cached: Path, more: list[str], sentence: str
) -> None:
    assert sentence in refused(use(world, cached, tmp_path / "student", *more))
    assert not list(tmp_path.iterdir())


def test_cache_of_another_tokenizer(
    world: Path, tmp_path: Path, refused: Refuse, cached: Path
) -> None:
    (tmp_path / "bytes.json").write_text(json.dumps(TINY | {"vocab_size": 258}))
    more = ["--student-config", tmp_path / "bytes.json", "--tokenizer", world / "bytes"]
    argv = without(use(world, cached, tmp_path / "student", *more), "--teacher")
    assert "was made with another tokenizer, so its token ids mean other tokens" in refused(argv)


def test_cache_of_another_teacher_is_not_continued(
    world: Path, refused: Refuse, cached: Path
) -> None:
    argv = without(arguments(world, cached, "--teacher", world / "second"), "--output")
    sentence = refused([*argv, "--cache-teacher", str(cached), "--cache-k", "32"])
    assert "was made from another teacher; remove it or name another folder" in sentence


def test_several_teachers_are_not_cached(world: Path, tmp_path: Path, refused: Refuse) -> None:
    teachers = ["--teacher", world / "teacher", world / "second"]
    argv = without(arguments(world, tmp_path / "x", *teachers), "--output")
    sentence = refused([*argv, "--cache-teacher", str(tmp_path / "cache")])
    assert sentence == "a cache holds one teacher's answers; name it with --teacher"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_shard_is_named_and_made_again(
    world: Path, tmp_path: Path, refused: Refuse, cached: Path, damage: str
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    (shard,) = folder.glob("shard-*")
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[-40] ^= 0xFF
        shard.write_bytes(data)
    else:
        shard.unlink()
    sentence = refused(use(world, folder, tmp_path / "student"))
    assert sentence.startswith(f"{shard} is ")
    assert "running the same --cache-teacher command again rebuilds this file alone" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    assert cache(world, folder, "--cache-k", "32") == 0
    (original,) = cached.glob("shard-*")
    assert shard.read_bytes() == original.read_bytes()
    assert main(use(world, folder, tmp_path / "student")) == 0


# --------------------------------------------------------------------------- stopped and resumed

LONG = ["--steps", "24", "--checkpoint-every", "3", "--evaluate-every", "10"]
KINDS: dict[str, list[str]] = {
    "plain": [],
    "everything": [
        *("--loss", "forward_kl:weight=0.8", "hidden_mse:weight=0.1", "reverse_kl:weight=0.1"),
        *("--on-policy", "0.4", "--rollout-every", "8", "--rollout-texts", "4"),
        *("--rollout-max-tokens", "4", "--accumulate", "2", "--fine-tune", "lora"),
    ],
}


@pytest.fixture(scope="module")
def wholes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of students whose training was never stopped."""
    folder = tmp_path_factory.mktemp("wholes")
    return {
        name: learn(world, folder / name / "student", *LONG, *more) for name, more in KINDS.items()
    }


def started(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_distill.distill", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_training_resumes_with_the_same_bits(
    world: Path, tmp_path: Path, wholes: dict[str, Path], kind: str
) -> None:
    """Twice, without notice, and never after the same step."""
    output = tmp_path / "student"
    argv = arguments(world, output, *LONG, *KINDS[kind])
    work = tmp_path / "student.partial"
    for step, more in ((3, []), (12, ["--resume"])):
        with started([*argv, *more]) as process:
            first = work / f"step-{step:07d}"
            wait_for(process, lambda first=first: any(p >= first for p in work.glob("step-*")))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not output.exists()
    assert main([*argv, "--resume"]) == 0
    assert not work.exists()
    assert same_result(output, wholes[kind])
    for name in ("config.json", "config.yaml", "log.csv"):
        assert (output / name).read_bytes() == (wholes[kind] / name).read_bytes()


def test_interrupted_training_says_how_to_go_on(
    world: Path, tmp_path: Path, wholes: dict[str, Path]
) -> None:
    output = tmp_path / "student"
    argv = arguments(world, output, *LONG)
    work = tmp_path / "student.partial"
    with started(argv) as process:
        wait_for(process, lambda: any(work.glob("step-*")))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert "finishing this step, then saving; Ctrl-C again ends at once" in err
    found = re.search(r"stopped after step (\d+) of 24; the same command with --resume goes", err)
    assert found, err
    step = int(found[1])
    assert 3 <= step < 24
    assert (work / f"step-{step:07d}").is_dir()
    assert [row["step"] for row in log_of(work)] == list(range(1, step + 1))
    assert not output.exists()
    assert main([*argv, "--resume"]) == 0
    assert same_result(output, wholes["plain"])


def test_second_interrupt_ends_at_once(world: Path, tmp_path: Path) -> None:
    """The checkpoints from before are there."""
    argv = arguments(world, tmp_path / "student", "--steps", "100000", "--checkpoint-every", "5")
    work = tmp_path / "student.partial"
    with started(argv) as process:
        wait_for(process, (work / "step-0000005").exists)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped" in err
    assert list(work.glob("step-*"))


class Interrupt:
    """Stands in for Ctrl-C while a step is computed."""

    def __init__(self, step: int):
        self.step = step

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_interrupt_at_any_step(
    world: Path,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    argv = arguments(world, tmp_path / "student")
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(step))
        status = main(argv)
    if step < 5:  # it is heard of after the next step; the sixth is the last one
        assert status == 130
        assert f"stopped after step {step + 1} of 6" in capsys.readouterr().err
        assert main([*argv, "--resume"]) == 0
    else:
        assert status == 0
    assert same_result(tmp_path / "student", finished)


def leave_unfinished(world: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(2))
        assert main(arguments(world, output)) == 130


def test_other_options_are_not_resumed(
    world: Path, tmp_path: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    output = tmp_path / "student"
    leave_unfinished(world, output, monkeypatch)
    sentence = refused(arguments(world, output, "--resume", "--batch-size", "2", "--steps", "9"))
    assert sentence == (
        "cannot resume with other settings: batch_size was 3, is 2; training.steps was 6, is 9"
    )
    sentence = refused(arguments(world, output, "--resume", "--loss", "hard"))
    assert "loss was ['forward_kl'], is ['hard']" in sentence
    sentence = refused(arguments(world, output))
    assert "holds an unfinished training; add --resume, or remove it" in sentence
    assert main(arguments(world, output, "--resume")) == 0
    assert same_result(output, finished)


def test_refused_resume_keeps_the_checkpoints(
    world: Path, tmp_path: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "student"
    leave_unfinished(world, output, monkeypatch)
    before = sorted(path.name for path in (tmp_path / "student.partial").iterdir())
    sentence = refused(arguments(world, output, "--resume", "--report-to", "carrier-pigeon"))
    assert "carrier-pigeon" in sentence
    assert sorted(path.name for path in (tmp_path / "student.partial").iterdir()) == before


def test_resume_of_a_damaged_folder(
    world: Path, tmp_path: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    """Without settings nothing is resumed; a damaged checkpoint gives way to the one before."""
    output = tmp_path / "student"
    leave_unfinished(world, output, monkeypatch)
    work = tmp_path / "student.partial"
    names = sorted(path.name for path in work.glob("step-*"))
    assert names == ["step-0000002", "step-0000003"]
    weights = work / "step-0000003" / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = (work / "settings.json").read_text()
    (work / "settings.json").write_text(settings[:20])
    argv = arguments(world, output, "--resume")
    assert f"{work / 'settings.json'} cannot be read as JSON: " in refused(argv)
    (work / "settings.json").write_text(settings)
    assert main(argv) == 0
    assert same_result(output, finished)


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_the_export(
    world: Path, tmp_path: Path, refused: Refuse, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is not lost."""
    output = tmp_path / "student"
    argv = arguments(world, output)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_distill.distillation.exporting.save_config", full_disk)
        sentence = refused(argv)
    assert sentence == f"{output} could not be written: [Errno 28] No space left on device"
    assert {path.name for path in tmp_path.iterdir()} == {"student.partial"}
    assert main([*argv, "--resume"]) == 0
    assert same_result(output, finished)


def test_full_disk_at_a_checkpoint(
    world: Path, tmp_path: Path, refused: Refuse, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "student"
    argv = arguments(world, output)
    save = mx.save_safetensors

    def fails_later(path: str, *args: Any) -> None:
        if (tmp_path / "student.partial" / "step-0000002").exists():
            raise RuntimeError("[save] Failed to write")
        save(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", fails_later)
        sentence = refused(argv)
    good = tmp_path / "student.partial" / "step-0000002"
    assert sentence == (
        "the checkpoint of step 4 could not be written ([save] Failed to write); the last good "
        f"checkpoint is {good}"
    )
    assert main([*argv, "--resume"]) == 0
    assert same_result(output, finished)


# ---------------------------------------------------------------------------------- not a number


def test_poisoned_student_is_not_trained(
    world: Path, tmp_path: Path, refused: Refuse, tokenizer: Any
) -> None:
    weights = save(tmp_path / "poisoned", TINY, 3, tokenizer) / "model.safetensors"
    values: dict[str, mx.array] = mx.load(str(weights))  # pyright: ignore
    mx.eval(values)
    values["model.norm.weight"] = mx.full((32,), mx.nan)
    mx.save_safetensors(str(weights), values, {"format": "mlx"})
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    sentence = refused([*argv, "--student", str(tmp_path / "poisoned")])
    found = re.match(
        r"the loss of step 1 is nan, on rows \[(.*)\] of the data; there is no checkpoint before "
        r"it; a smaller learning rate may help",
        sentence,
    )
    assert found, sentence
    rows = [int(row) for row in found[1].split(", ")]
    assert len(set(rows)) == 3
    assert all(0 <= row < 12 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"poisoned"}


def test_training_that_explodes_keeps_its_last_good_checkpoint(
    world: Path, tmp_path: Path, refused: Refuse
) -> None:
    more = ["--learning-rate", "1000", "--checkpoint-every", "1", "--warmup", "0"]
    sentence = refused(arguments(world, tmp_path / "student", *more))
    found = re.match(
        r"the (loss|gradient) of step (\d) is (nan|-?inf), on rows \[.*\] of the data; the last "
        r"good checkpoint is (.*); a smaller learning rate may help",
        sentence,
    )
    assert found, sentence
    step = int(found[2]) - 1
    folder = tmp_path / "student.partial" / f"step-{step:07d}"
    assert found[4] == str(folder)
    saved = mx.load(str(folder / "network.safetensors"))
    assert isinstance(saved, dict)
    assert all(mx.isfinite(x).all().item() for x in saved.values())
    assert not (tmp_path / "student").exists()


# --------------------------------------------------------------------------- what is in the folder


def quantised(world: Path, where: Path) -> Path:
    """Write a 4-bit student of two end tokens."""
    wide = world.parent / f"{where.name}.json"
    wide.write_text(json.dumps(TINY | {"hidden_size": 64, "intermediate_size": 64}))
    more = ["--export-bits", "4", "--student-config", wide]
    learn(world, where, *more)
    (where / "generation_config.json").write_text('{"eos_token_id": [2, 17]}')
    return where


def test_adapters_over_packed_weights(world: Path, tmp_path: Path) -> None:
    """Every way of writing them; the figures are those of the files, and all end tokens stay."""
    base = quantised(world, tmp_path / "base")
    for number, ways in enumerate(([], ["--keep-adapters"], ["--export-dequantized"])):
        output = tmp_path / f"student-{number}"
        argv = without(arguments(world, output, "--student", base), "--student-config")
        assert main([*argv, "--fine-tune", "lora", *ways]) == 0
        apart = output / "adapters" if "--keep-adapters" in ways else None
        model, tokenizer = load(output, adapter_path=apart)
        assert tokenizer.eos_token_ids == {2, 17}
        packed = any("scales" in module for module in model.modules())
        assert packed == ("--export-dequantized" not in ways)
        valid, _ = fit(read_texts(world / "texts" / "valid.jsonl", tokenizer), 512)
        found = evaluate({"student": model}, valid)["student"]
        nats = found["nats"].sum() / found["tokens"].sum()
        figures = json.loads((output / "training.json").read_text())["held_out"]
        assert figures["after"]["nats"] == pytest.approx(nats, rel=1e-4)
        trained = figures.get("trained", figures["after"])["nats"]
        if ways:  # nothing is lost
            assert figures["after"]["nats"] == pytest.approx(trained, rel=1e-3)
