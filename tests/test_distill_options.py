"""The options of ``distill``: files of them, and what cannot be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from distilling import TINY, Refuse, arguments, learn, main, same_result, without, write_yaml

from mlx_distill import machine

pytestmark = pytest.mark.usefixtures("no_hub", "no_curves")

# ------------------------------------------------------------------------------------ YAML


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
    world: Path, tmp_path: Path, refuses: Refuse, values: Any, sentence: str
) -> None:
    path = write_yaml(tmp_path / "run.yaml", values)
    argv = [*arguments(world, tmp_path / "student"), "--config", str(path)]
    found = refuses(argv)
    assert found.startswith(f"the config {path}")
    assert sentence in found
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]


def test_file_of_options_that_is_not_there(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    argv = [*arguments(world, tmp_path / "student"), "--config", str(tmp_path / "no.yaml")]
    assert "no.yaml cannot be read: " in refuses(argv)


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        ({"name": "forwad_kl"}, "there is no loss forwad_kl; there are hard, forward_kl, "),
        ({"weight": 1}, "a loss needs a name, got {'weight': 1}"),
        ({"name": "hard", "wieght": 1}, "hard has no option wieght; it has weight"),
    ],
)
def test_losses_of_a_file_that_cannot_be(
    world: Path, tmp_path: Path, refuses: Refuse, term: dict[str, Any], sentence: str
) -> None:
    path = write_yaml(tmp_path / "run.yaml", {"loss": [term]})
    argv = ["--config", str(path), "--data", str(world / "texts")]
    assert sentence in refuses(argv)


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
        ("--teacher B --loss sorted_l1 --teacher-weights 1 2", "2 weights do not fit 1 teachers"),
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
    world: Path, tmp_path: Path, refuses: Refuse, flags: str, sentence: str
) -> None:
    """Whatever is refuses, nothing is left behind that would be in the way of a better try."""
    assert sentence in refuses(arguments(world, tmp_path / "student", *flags.split()))
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
    world: Path, tmp_path: Path, refuses: Refuse, missing: str, count: int, more: str, sentence: str
) -> None:
    argv = arguments(world, tmp_path / "student", *more.split())
    assert sentence in refuses(without(argv, missing, count))
    assert not list(tmp_path.iterdir())


def test_layers_of_no_teacher(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    argv = [*without(argv, "--teacher"), "--loss", "hard", "--student-layers", "0"]
    assert "a student of the teacher's layers needs a teacher" in refuses(argv)


def test_layer_that_the_teacher_does_not_have(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    sentence = refuses([*argv, "--student-layers", "0", "3"])
    assert sentence == "there is no layer 3: the teacher has 3, 0 to 2"


def test_tokenizer_that_cannot_be_loaded(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    (tmp_path / "empty").mkdir()
    argv = arguments(world, tmp_path / "student", "--tokenizer", tmp_path / "empty")
    assert f"the tokenizer {tmp_path / 'empty'} cannot be loaded: " in refuses(argv)


def test_student_that_does_not_know_the_tokens(
    world: Path, tmp_path: Path, refuses: Refuse
) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps(TINY | {"vocab_size": 300}))
    argv = arguments(world, tmp_path / "student", "--student-config", tmp_path / "narrow.json")
    assert re.match(r"the texts hold token \d+, but a Model of 300 tokens is to", refuses(argv))
    assert {path.name for path in tmp_path.iterdir()} == {"narrow.json"}


def test_service_that_is_not_installed(
    world: Path, tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", None)
    argv = arguments(world, tmp_path / "student", "--report-to", "wandb")
    assert refuses(argv).startswith("--report-to: ")
    assert not list(tmp_path.iterdir())


def test_output_that_exists(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    output = tmp_path / "student"
    output.mkdir()
    argv = arguments(world, output)
    assert refuses(argv) == f"the output {output} exists; name another, or remove it"
    assert refuses([*argv, "--resume"]) == f"the output {output} exists; name another, or remove it"
    output.rename(tmp_path / "student.partial")
    sentence = f"{output}.partial holds an unfinished training; add --resume, or remove it"
    assert refuses(argv) == sentence


def test_memory_is_estimated_before_anything_is_written(
    world: Path, tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 5_000_000)
    sentence = refuses(arguments(world, tmp_path / "student"))
    assert re.match(
        r"memory: about 0\.\d\d GB \(teachers 0\.\d\d, student 0\.\d\d, gradients and optimizer "
        r"0\.\d\d, a batch of 3 x \d+ tokens 0\.\d\d\), but this machine has 0\.0 GB; use a "
        r"smaller --batch-size with --accumulate, --grad-checkpoint, or adapters \(--fine-tune",
        sentence,
    )
    assert not list(tmp_path.iterdir())
