"""What can go wrong in a training of a drafter: arguments, full disks, damaged checkpoints."""

import errno
import importlib
import os
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import ModelIn
from damage import (
    TARGET,
    Run,
    cut,
)
from half_models import REFERENCE

import mlx_distill
from mlx_distill import InputError, benchmark, train_drafter
from mlx_distill.distillation import responses
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig

# The package has a function of that name, too.
generate = importlib.import_module("mlx_distill.generate")
DRAFTER = REFERENCE
pytestmark = pytest.mark.usefixtures("bundled_once")

# ---------------------------------------------------------------------------------- train_drafter


TINY = [
    *("--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "2", "--batch-size", "2"),
    *("--max-tokens", "6", "--held-out", "1", "--steps", "6", "--checkpoint-every", "2"),
    *("--max-prompts", "4", "--prompt-tokens", "5", "--response-batch-size", "2", "--quiet"),
]


@pytest.fixture(scope="module")
def tiny(model_in: ModelIn) -> list[str]:
    """Return the arguments of a tiny training but for its output."""
    model = model_in("tiny", "float16")
    return ["--model", str(model), "--data", str(benchmark.PROMPTS), *TINY]


@pytest.fixture
def arguments(tmp_path: Path, tiny: list[str]) -> list[str]:
    """Return the arguments of a tiny training."""
    return [*tiny, "--output", str(tmp_path / "drafter")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "steps must be .*, got 0"),
        ("--checkpoint-every 0", "checkpoint_every must be .*, got 0"),
        ("--evaluate-every 0", "evaluate_every must be .*, got 0"),
        ("--learning-rate 0", "learning_rate must be .*, got 0"),
        ("--learning-rate -1", "learning_rate must be .*, got -1"),
        ("--learning-rate nan", "learning_rate must be .*, got nan"),
        ("--warmup -0.5", "warmup must be .*, got -0.5"),
        ("--warmup 2", "warmup must be .*, got 2"),
        ("--weight-decay nan", "weight_decay must be .*, got nan"),
        ("--max-grad-norm 0", "max_grad_norm must be .*, got 0"),
        ("--batch-size 0", "batch_size must be .*, got 0"),
        ("--unroll 0", "unroll must be .*, got 0"),
        ("--held-out 0", "held_out must be .*, got 0"),
        ("--held-out 4", "4 prompts are too few: 4 are held out"),
        ("--decay 0", "decay must be .*, got 0"),
        ("--decay 1.5", "decay must be .*, got 1.5"),
        ("--exit-dim 0", "exit_dim must be .*, got 0"),
        ("--exit-dim -4", "exit_dim must be .*, got -4"),
        ("--num-draft-layers -1", "num_draft_layers must be .*, got -1"),
        ("--draft-vocab-size -1", "draft_vocab_size must be .*, got -1"),
        ("--draft-vocab-size 5000", "draft_vocab_size must be .*4,?096, got 5000"),
        ("--max-tokens 0", "max_tokens must be .*, got 0"),
        ("--max-tokens 600", r"the model's context is 512; use a smaller"),
        ("--response-batch-size 0", "response_batch_size must be .*, got 0"),
        ("--temperatures -1", "temperatures must be .*-1"),
        ("--temperatures 0 nan", "temperatures must be .*nan"),
        ("--temperatures inf", "temperatures must be .*inf"),
        ("--response-seed -1", "response_seed must be .*-1"),
        ("--response-seed 4294967296", "response_seed must be .*4294967296"),
        ("--prompt-tokens 0", "prompt.tokens must be .*, got 0"),
        ("--prompt-tokens -2", "prompt.tokens must be .*, got -2"),
        ("--max-prompts 0", "max.prompts must be .*, got 0|too few"),
        ("--max-prompts -2", "max.prompts must be .*, got -2"),
        ("--seed -1", "seed must be .*-1"),
    ],
)
def test_training_values_out_of_range(
    refused: Run, tmp_path: Path, arguments: list[str], flags: str, message: str
) -> None:
    knows_target = "draft-vocab-size 5000" in flags  # the prompts are read by then
    sentence = refused(train_drafter.main, *arguments, *flags.split(), alone=not knows_target)
    assert re.search(message, sentence), sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--answers {} --prompt-tokens 5", "--prompt-tokens"),
        ("--answers {} --ignore-chat-template", "--ignore-chat-template"),
        ('--answers {} --chat-template-config {{"a":1}}', "--chat-template-config"),
        ("--max-prompts 5", "--max-prompts"),
        ("--prompt-tokens 5", "--prompt-tokens"),
    ],
)
def test_flags_that_would_change_nothing(
    refused: Run, tmp_path: Path, flags: str, said: str
) -> None:
    output = ["--output", str(tmp_path / "drafter")]
    sentence = refused(train_drafter.main, *flags.format(tmp_path / "a.npz").split(), *output)
    kind = "answers are token ids already" if "{}" in flags else "without --data there are none"
    assert sentence == f"{said} says how prompts are read; {kind}"


def test_output_that_exists(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    output = tmp_path / "drafter"
    output.mkdir()
    (output / "note").write_text("mine")
    assert f"the output {output} exists" in refused(train_drafter.main, *arguments)
    assert "exists" in refused(train_drafter.main, *arguments, "--resume")
    assert [path.name for path in output.iterdir()] == ["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]
    shutil.rmtree(output)
    output.write_text("a file")
    assert f"the output {output} exists" in refused(train_drafter.main, *arguments)


def test_resume_without_anything(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert "there is nothing to resume" in refused(train_drafter.main, *arguments, "--resume")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_the_machine_has_not(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    sentence = refused(train_drafter.main, *arguments, "--batch-size", "90000000", alone=False)
    assert re.search(r"memory: about [\d.]+ GB .*, but this machine has [\d.]+ GB", sentence)
    assert list(tmp_path.iterdir()) == []


class DiskFull:
    """Lets a function run a number of times, then pretends that the disk is full."""

    def __init__(self, function: Callable[..., Any], times: int):
        self.function = function
        self.times = times

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.times -= 1
        if self.times < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return self.function(*args, **options)


class Truncating(DiskFull):
    """Writes, but from a number of times on leaves out the end, without a word."""

    def __init__(self, function: Callable[..., Any], times: int, missing: int):
        super().__init__(function, times)
        self.missing = missing

    def __call__(self, path: str, *args: Any, **options: Any) -> None:
        self.function(path, *args, **options)
        self.times -= 1
        if self.times < 0:
            with open(path, "r+b") as file:
                file.truncate(max(0, os.path.getsize(path) - self.missing))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> bytes:
    """Return the weights of a tiny training that met no obstacle."""
    output = tmp_path_factory.mktemp("finished") / "drafter"
    assert train_drafter.main([*tiny, "--output", str(output)]) == 0
    return (output / "model.safetensors").read_bytes()


def resumed(arguments: list[str], tmp_path: Path) -> bytes:
    """Go on with a training that was stopped; return its weights."""
    assert train_drafter.main([*arguments, "--resume"]) == 0
    assert not (tmp_path / "drafter.partial").exists()
    return (tmp_path / "drafter" / "model.safetensors").read_bytes()


def stopped(folder: Path, tiny: list[str], good: int, *more: str) -> Path:
    """Return a folder in which a training met a full disk after some checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", DiskFull(mx.save_safetensors, 2 * good))
        assert train_drafter.main([*tiny, "--output", str(folder / "drafter"), *more]) == 2
    return folder


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    return stopped(tmp_path_factory.mktemp("stopped"), tiny, 1)


@pytest.fixture(scope="module")
def after_four_steps(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    return stopped(tmp_path_factory.mktemp("stopped"), tiny, 2, "--evaluate-every", "1")


# Two files per checkpoint; the training goes on after the first one.
OBSTACLES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "no space for the arrays": (mx, "save_safetensors", lambda f: DiskFull(f, 1)),
    "no space for the first array": (mx, "save_safetensors", lambda f: DiskFull(f, 0)),
    "no space for the name": (os, "replace", lambda f: DiskFull(f, 1)),  # the first: settings
    "half a file": (mx, "save_safetensors", lambda f: Truncating(f, 0, 30_000)),
    "the last bytes": (mx, "save_safetensors", lambda f: Truncating(f, 1, 8)),
    "the last bytes of the network": (mx, "save_safetensors", lambda f: Truncating(f, 0, 8)),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_full_disk_during_a_checkpoint(
    refused: Run,
    tmp_path: Path,
    arguments: list[str],
    after_two_steps: Path,
    finished: bytes,
    case: str,
) -> None:
    shutil.copytree(after_two_steps, tmp_path, dirs_exist_ok=True)
    place, name, make = OBSTACLES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, make(getattr(place, name)))
        sentence = refused(train_drafter.main, *arguments, "--resume", alone=False)
    assert re.search(r"the checkpoint of step 4 could not be written", sentence)
    assert re.search("No space left on device|is damaged", sentence)
    work = tmp_path / "drafter.partial"
    assert f"the last good checkpoint is {work / 'step-0000002'}" in sentence
    assert sorted(path.name for path in work.glob("*step*")) == ["step-0000002"]
    assert not (work / "writing").exists()
    assert not (tmp_path / "drafter").exists()
    assert resumed(arguments, tmp_path) == finished


def test_full_disk_at_the_first_checkpoint(
    refused: Run, tmp_path: Path, arguments: list[str], finished: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", DiskFull(mx.save_safetensors, 0))
        sentence = refused(train_drafter.main, *arguments, alone=False)
    assert re.search("there is no.* before it", sentence)
    assert resumed(arguments, tmp_path) == finished


@pytest.mark.parametrize(
    "make", [lambda f: DiskFull(f, 4), lambda f: Truncating(f, 4, 1000)], ids=["full", "cut"]
)
def test_full_disk_for_the_finished_drafter(
    refused: Run,
    tmp_path: Path,
    arguments: list[str],
    after_two_steps: Path,
    finished: bytes,
    make: Callable[[Any], Any],
) -> None:
    """All checkpoints are good; the work must not be lost, and no half drafter appear."""
    shutil.copytree(after_two_steps, tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", make(mx.save_safetensors))
        refused(train_drafter.main, *arguments, "--resume", alone=False)
    assert (tmp_path / "drafter.partial" / "step-0000006").is_dir()
    assert not (tmp_path / "drafter").exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["drafter.partial", "drafter.responses.jsonl"]
    assert resumed(arguments, tmp_path) == finished


def test_full_disk_for_the_responses(
    refused: Run, tmp_path: Path, arguments: list[str], finished: bytes
) -> None:
    """The first part is written, the second one meets a full disk."""
    opened, parts = Path.open, []

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.suffix == ".jsonl" and "a" in mode:
            parts.append(path)
            if len(parts) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(responses, "PART", 1)
        sentence = refused(train_drafter.main, *arguments, alone=False)
    assert len(parts) == 2
    assert "No space left on device" in sentence
    assert resumed(arguments, tmp_path) == finished


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--learning-rate 0.5", r"training.learning_rate was 0.001, is 0.5"),
        ("--seed 9", r"seed was 0, is 9"),
        ("--temperatures 0.5", r"temperatures was \[0.0, 1.0\], is \[0.5\]"),
        ("--exit-dim 48", r"exit_dim was 32, is 48"),
        ("--max-prompts 3", r"max_prompts was 4, is 3"),
        ("--prompt-tokens 4", r"prompt_tokens was 5, is 4"),
    ],
)
def test_resume_with_changed_settings(
    refused: Run,
    tmp_path: Path,
    arguments: list[str],
    after_two_steps: Path,
    flags: str,
    difference: str,
) -> None:
    shutil.copytree(after_two_steps, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    changes = [*arguments, *flags.split(), "--resume"]
    sentence = refused(train_drafter.main, *changes, alone=False)
    assert re.search(difference, sentence), sentence
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


DAMAGED = ["settings.json", "log.jsonl", "network.safetensors", "optimizer.safetensors"]


@pytest.mark.parametrize("name", DAMAGED)
def test_resume_from_damaged_files(
    tmp_path: Path,
    arguments: list[str],
    after_four_steps: Path,
    finished: bytes,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """A machine that lost its power leaves half a file; it is named, or there is a way without."""
    arguments += ["--evaluate-every", "1"]
    shutil.copytree(after_four_steps, tmp_path, dirs_exist_ok=True)
    *_, path = sorted((tmp_path / "drafter.partial").rglob(name))
    cut(0.5)(path)
    status = train_drafter.main([*arguments, "--resume"])
    err = capsys.readouterr().err
    if status == 0:
        assert (tmp_path / "drafter" / "model.safetensors").read_bytes() == finished
    else:
        assert status == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert path.name in err.splitlines()[-1]


def test_unfinished_training_without_resume(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "drafter.partial").mkdir()
    sentence = refused(train_drafter.main, *arguments)
    assert "drafter.partial holds an unfinished training; add --resume" in sentence


@pytest.mark.parametrize(
    "content",
    [
        b'{"target": {"hidden_size": 64}, "config": {}}\n',
        b"once upon a time\n",
        b"[]\n",
        b"\xff\n",
    ],
)
def test_responses_that_are_none(
    refused: Run, tmp_path: Path, arguments: list[str], content: bytes
) -> None:
    """Neither another target's, nor any other file; and it is not touched."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    flags = [*arguments, "--responses", path]
    sentence = refused(train_drafter.main, *flags, alone=False)
    assert "answers.jsonl" in sentence
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_responses_in_a_folder_that_is_not_there(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    path = tmp_path / "no" / "answers.jsonl"
    sentence = refused(train_drafter.main, *arguments, "--responses", path, alone=False)
    assert "answers.jsonl" in sentence
    assert list(tmp_path.iterdir()) == []


def test_start_from_another_shape(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    arguments += ["--model", str(TARGET)]
    sentence = refused(train_drafter.main, *arguments, "--start-from", DRAFTER, alone=False)
    assert "shape" in sentence
    assert list(tmp_path.iterdir()) == []


def test_start_from_nothing(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert "there is no folder" in refused(train_drafter.main, *arguments, "--start-from", "none")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- the Python side


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


def test_drafter_folder_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = RecurrentDrafter(RecurrentDrafterConfig(384, 4096, 64, 1, draft_vocab_size=512))
    folder = tmp_path / "drafter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", DiskFull(os.replace, 0))
        with pytest.raises((OSError, InputError)):
            save_drafter(folder, network, {"hidden_size": 384, "vocab_size": 4096}, {})
    assert not folder.exists()
    save_drafter(folder, network, {"hidden_size": 384, "vocab_size": 4096}, {"README.md": "hi"})
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    model, tokenizer = mlx_distill.load(TARGET)
    drafter = mlx_distill.load_drafter(folder, model)
    responses = mlx_distill.stream_generate(model, tokenizer, "Once", max_tokens=4)
    assert len(list(islice(responses, 4))) == 4
    with pytest.raises(InputError, match="tokenizer hash is None"):
        mlx_distill.load_drafter(folder, model, tokenizer)
    assert drafter.config.draft_vocab_size == 512
