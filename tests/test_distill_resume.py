"""``distill`` stopped, resumed and gone wrong: nothing is lost that was good."""

import errno
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

import mlx.core as mx
import pytest
from distilling import (
    TINY,
    Refuse,
    arguments,
    command,
    learn,
    log_of,
    main,
    same_result,
    save,
    without,
)

pytestmark = pytest.mark.usefixtures("no_hub", "no_curves")

# --------------------------------------------------------------------------- stopped and resumed

EVERYTHING = [
    *("--loss", "forward_kl:weight=0.8", "hidden_mse:weight=0.1", "reverse_kl:weight=0.1"),
    *("--steps", "12", "--on-policy", "0.4", "--rollout-every", "3", "--rollout-texts", "4"),
    *("--rollout-max-tokens", "4", "--accumulate", "2", "--fine-tune", "lora"),
]


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


def test_killed_training_resumes_with_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a training can do goes on: killed without notice, and stopped once more."""
    whole = learn(world, tmp_path / "whole", *EVERYTHING)
    output = tmp_path / "student"
    argv = arguments(world, output, *EVERYTHING)
    work = tmp_path / "student.partial"
    with started(argv) as process:
        wait_for(process, lambda: any(work.glob("step-*")))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(10))
        assert main([*argv, "--resume"]) == 130
    assert not output.exists()
    assert main([*argv, "--resume"]) == 0
    assert not work.exists()
    assert same_result(output, whole)
    assert all(math.isfinite(row["loss"]) for row in log_of(whole))
    for name in ("config.json", "config.yaml", "log.csv"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


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
    """The next step is finished and saved; the command says how to go on, to the same bits."""
    output, work = tmp_path / "student", tmp_path / "student.partial"
    argv = arguments(world, output)
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(step))
        status = main(argv)
    out, err = capsys.readouterr()
    assert "finishing this step, then saving; Ctrl-C again ends at once" in err
    if step < 5:  # it is heard of after the next step; the sixth is the last one
        assert status == 130
        assert out == ""
        assert f"stopped after step {step + 1} of 6; the same command with --resume goes" in err
        assert (work / f"step-{step + 1:07d}").is_dir()
        assert [row["step"] for row in log_of(work)] == list(range(1, step + 2))
        assert not output.exists()
        assert main([*argv, "--resume"]) == 0
    else:
        assert status == 0
    assert same_result(output, finished)


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a training that was stopped after its third step."""
    output = tmp_path_factory.mktemp("stopped") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(2))
        assert main(arguments(world, output)) == 130
    return output.with_name("student.partial")


@pytest.fixture
def unfinished(stopped: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, beside the output."""
    return shutil.copytree(stopped, tmp_path / "student.partial")


def test_other_options_are_not_resumed(
    world: Path, tmp_path: Path, refuses: Refuse, unfinished: Path, finished: Path
) -> None:
    """A refused resume keeps the checkpoints."""
    output = tmp_path / "student"
    before = sorted(path.name for path in unfinished.iterdir())
    sentence = refuses(arguments(world, output, "--resume", "--batch-size", "2", "--steps", "9"))
    assert sentence == (
        "cannot resume with other settings: batch_size was 3, is 2; training.steps was 6, is 9"
    )
    sentence = refuses(arguments(world, output, "--resume", "--loss", "hard"))
    assert "loss was ['forward_kl'], is ['hard']" in sentence
    sentence = refuses(arguments(world, output, "--resume", "--report-to", "carrier-pigeon"))
    assert "carrier-pigeon" in sentence
    sentence = refuses(arguments(world, output))
    assert "holds an unfinished training; add --resume, or remove it" in sentence
    assert sorted(path.name for path in unfinished.iterdir()) == before
    assert main(arguments(world, output, "--resume")) == 0
    assert same_result(output, finished)


def scaled(folder: Path) -> None:
    """Write other weights over those of a model."""
    path = folder / "model.safetensors"
    values: dict[str, mx.array] = mx.load(str(path))  # pyright: ignore
    mx.eval(values)
    halves = {name: x / 2 if x.ndim > 1 else x for name, x in values.items()}
    mx.save_safetensors(str(path), halves, {"format": "mlx"})


def test_parts_that_changed_in_place_are_not_resumed(
    world: Path, tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All names are the same; the sentence says what is another one behind which."""
    own, output = shutil.copytree(world, tmp_path / "world"), tmp_path / "out" / "student"
    argv = without(arguments(own, output, "--student", own / "student"), "--student-config")
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(2))
        assert main(argv) == 130
    work = output.with_name("student.partial")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    was = "cannot resume with other settings: given."
    for name, changed in (("teacher", "teachers.networks"), ("student", "student_weights")):
        kept = (own / name / "model.safetensors").read_bytes()
        scaled(own / name)
        assert re.fullmatch(rf"{was}{changed} was \S+, is \S+", refuses([*argv, "--resume"]))
        (own / name / "model.safetensors").write_bytes(kept)
    for name, changed in (("train", "data"), ("valid", "valid")):
        kept = (own / "texts" / f"{name}.jsonl").read_bytes()
        rows = kept.splitlines(keepends=True)
        (own / "texts" / f"{name}.jsonl").write_bytes(b"".join(rows[::-1]))
        assert re.fullmatch(rf"{was}{changed} was \w+, is \w+", refuses([*argv, "--resume"]))
        (own / "texts" / f"{name}.jsonl").write_bytes(kept)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert main([*argv, "--resume"]) == 0


def test_another_cache_of_the_same_name_is_not_resumed(
    world: Path, tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same texts, written by another teacher."""
    output, cache = tmp_path / "student", tmp_path / "cache"
    learn = arguments(world, output, "--tokenizer", world / "teacher", "--use-cache", cache)
    learn = without(learn, "--teacher")

    def write(teacher: str) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        argv = ["--teacher", world / teacher, "--data", world / "texts", "--cache-teacher", cache]
        assert main([*map(str, argv), "--quiet"]) == 0

    write("teacher")
    with monkeypatch.context() as patch:
        patch.setattr(command, "get_reporting_callbacks", lambda *a, **k: Interrupt(2))
        assert main(learn) == 130
    write("second")
    assert "other settings: given.teachers.cache was" in refuses([*learn, "--resume"])
    write("teacher")
    assert main([*learn, "--resume"]) == 0


def test_resume_of_a_damaged_folder(
    world: Path, tmp_path: Path, refuses: Refuse, unfinished: Path, finished: Path
) -> None:
    """Without settings nothing is resumed; a damaged checkpoint gives way to the one before."""
    names = sorted(path.name for path in unfinished.glob("step-*"))
    assert names == ["step-0000002", "step-0000003"]
    weights = unfinished / "step-0000003" / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = (unfinished / "settings.json").read_text()
    (unfinished / "settings.json").write_text(settings[:20])
    argv = arguments(world, tmp_path / "student", "--resume")
    assert f"{unfinished / 'settings.json'} cannot be read as JSON: " in refuses(argv)
    (unfinished / "settings.json").write_text(settings)
    assert main(argv) == 0
    assert same_result(tmp_path / "student", finished)


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_the_export(
    world: Path, tmp_path: Path, refuses: Refuse, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is not lost."""
    output = tmp_path / "student"
    argv = arguments(world, output)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_distill.distillation.exporting.save_config", full_disk)
        sentence = refuses(argv)
    assert sentence == f"{output} could not be written: [Errno 28] No space left on device"
    assert {path.name for path in tmp_path.iterdir()} == {"student.partial"}
    assert main([*argv, "--resume"]) == 0
    assert same_result(output, finished)


def test_full_disk_at_a_checkpoint(
    world: Path, tmp_path: Path, refuses: Refuse, finished: Path, monkeypatch: pytest.MonkeyPatch
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
        sentence = refuses(argv)
    good = tmp_path / "student.partial" / "step-0000002"
    assert sentence == (
        "the checkpoint of step 4 could not be written ([save] Failed to write); the last good "
        f"checkpoint is {good}"
    )
    assert main([*argv, "--resume"]) == 0
    assert same_result(output, finished)


# ---------------------------------------------------------------------------------- not a number


def test_poisoned_student_is_not_trained(
    world: Path, tmp_path: Path, refuses: Refuse, tokenizer: Any
) -> None:
    weights = save(tmp_path / "poisoned", TINY, 3, tokenizer) / "model.safetensors"
    values: dict[str, mx.array] = mx.load(str(weights))  # pyright: ignore
    mx.eval(values)
    values["model.norm.weight"] = mx.full((32,), mx.nan)
    mx.save_safetensors(str(weights), values, {"format": "mlx"})
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    sentence = refuses([*argv, "--student", str(tmp_path / "poisoned")])
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
    world: Path, tmp_path: Path, refuses: Refuse
) -> None:
    more = ["--learning-rate", "1000", "--checkpoint-every", "1", "--warmup", "0"]
    sentence = refuses(arguments(world, tmp_path / "student", *more))
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
