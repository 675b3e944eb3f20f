"""Unfinished trainings with something wrong in their folders: one sentence, and no other result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from interrupting import KillAt, Killed
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import InputError
from mlx_distill.data.texts import Text
from mlx_distill.distillation import drafter_training
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.distillation.training import distill
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.journal import Journal, read_log

PROMPTS = [[1, 5, 7], [1, 9, 4], [1, 8], [1, 11]]
TEXTS = [Text([5 + n, 6, 7 + n, 8, 9 + n, 10]) for n in range(6)]
Edit = Callable[[Path], Any]


def lines(*kept: int) -> Edit:
    """Return what leaves some rows of a log, counted from 0."""

    def edit(path: Path) -> None:
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rows[number] for number in kept))

    return edit


def row_without(name: str) -> Edit:
    def edit(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        del rows[0][name]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return edit


LOGS: list[tuple[Edit, str]] = [
    (Path.unlink, r"log\.jsonl is missing, the log of 6 steps that are done; remove .* anew"),
    (lines(0), r"log\.jsonl is damaged: it lacks step (4|2), which is done"),
    (lines(1), r"log\.jsonl is damaged: it lacks step (2|1), which is done"),
    (lines(1, 0, 2), r"log\.jsonl is damaged: (its steps are out of order|it lacks step 4)"),
    (row_without("step"), r"log\.jsonl is damaged: row 1 is not that of a step"),
    (row_without("loss"), r"log\.jsonl is damaged: row 1 is not that of a step"),
    (lambda path: path.write_bytes(b"\xff\xfe\n" * 6), r"log\.jsonl is not UTF-8 text"),
    (lambda path: path.write_text("[1]\n" * 6), r"log\.jsonl, line 1: expected a JSON object"),
]


def without_array(name: str) -> Edit:
    """Return what takes an array out of the newest checkpoint's file."""

    def edit(folder: Path) -> None:
        path = max(folder.glob("step-*")) / name
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
        # What only an optimizer has, and every optimizer: the means of a weight.
        del arrays[max(name for name in arrays if arrays[name].ndim > 1)]
        mx.save_safetensors(str(path), arrays)

    return edit


def of_another_shape(folder: Path) -> None:
    path = max(folder.glob("step-*")) / "network.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    name = max(name for name in arrays if arrays[name].ndim > 1)
    mx.save_safetensors(str(path), arrays | {name: arrays[name][:1]})


CHECKPOINTS: list[tuple[Edit, str]] = [
    (without_array("network.safetensors"), r"step-0000006/network\.safetensors is damaged: it la"),
    (without_array("optimizer.safetensors"), r"optimizer\.safetensors is damaged: it lacks optim"),
    (of_another_shape, r"network\.safetensors is damaged: .* is of shape"),
]

# ------------------------------------------------------------------------------------- of drafters


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float32"))


def drafter(pair: tuple[Any, Any], output: Path, **options: Any) -> Any:
    training = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 2} | options.pop("how", {})
    config = DrafterTraining(
        held_out=1,
        starts=8,
        exit_dim=16,
        draft_vocab_size=64,
        training=TrainingConfig(**training),
        responses=ResponseConfig(max_tokens=6),
    )
    return mlx_distill.train_drafter(*pair, PROMPTS, output, config, quiet=True, **options)


@pytest.fixture(scope="module")
def killed(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a training that was killed when it had all but written its result."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at_the_end(pair, folder / "drafter")
    return folder


def kill_at_the_end(pair: tuple[Any, Any], output: Path, **options: Any) -> None:
    def ends(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafter_training, "_write", ends)
        with pytest.raises(Killed):
            drafter(pair, output, **options)


def test_what_is_whole_is_gone_on_with(tmp_path: Path, killed: Path, pair: tuple[Any, Any]):
    shutil.copytree(killed, tmp_path / "copy")
    log = drafter(pair, tmp_path / "copy" / "drafter", resume=True)
    assert [row["step"] for row in log] == [2, 4, 6]


@pytest.mark.parametrize(
    ("edit", "sentence"), [*LOGS, (row_without("acceptance_greedy"), "row 1 is not that of a step")]
)
def test_the_log_of_a_drafter(
    tmp_path: Path, killed: Path, pair: tuple[Any, Any], edit: Edit, sentence: str
):
    folder = shutil.copytree(killed, tmp_path / "copy")
    edit(folder / "drafter.partial" / "log.jsonl")
    with pytest.raises(InputError, match=sentence):
        drafter(pair, folder / "drafter", resume=True)
    assert not (folder / "drafter").exists()


@pytest.mark.parametrize(("edit", "sentence"), CHECKPOINTS)
def test_the_checkpoints_of_a_drafter(
    tmp_path: Path, killed: Path, pair: tuple[Any, Any], edit: Edit, sentence: str
):
    folder = shutil.copytree(killed, tmp_path / "copy")
    work = folder / "drafter.partial"
    edit(work)
    with pytest.raises(InputError, match=sentence):
        drafter(pair, folder / "drafter", resume=True)
    shutil.rmtree(work / "step-0000006")  # as the sentence says
    log = drafter(pair, folder / "drafter", resume=True)
    assert [row["step"] for row in log] == [2, 4, 6]


def test_a_log_that_nothing_was_written_into(tmp_path: Path, pair: tuple[Any, Any]):
    """The checkpoints come before the first evaluation."""
    how = {"evaluate_every": 6}
    kill_at_the_end(pair, tmp_path / "drafter", how=how)
    work = tmp_path / "drafter.partial"
    (work / "log.jsonl").unlink()
    with pytest.raises(InputError, match="the log of 6 steps that are done"):
        drafter(pair, tmp_path / "drafter", how=how, resume=True)
    shutil.rmtree(work / "step-0000006")
    assert len(drafter(pair, tmp_path / "drafter", how=how, resume=True)) == 1


def test_the_last_row_of_a_training_that_time_has_ended(tmp_path: Path, pair: tuple[Any, Any]):
    how = {"max_minutes": 1e-9, "steps": 90, "evaluate_every": 80}
    kill_at_the_end(pair, tmp_path / "drafter", how=how)
    log = tmp_path / "drafter.partial" / "log.jsonl"
    whole = log.read_text()
    log.write_text("")
    with pytest.raises(InputError, match=r"log\.jsonl is damaged: it lacks step \d+, which is do"):
        drafter(pair, tmp_path / "drafter", how=how, resume=True)
    log.write_text(whole)
    assert len(drafter(pair, tmp_path / "drafter", how=how, resume=True)) == 1


# ------------------------------------------------------------------------------------- of students


def small() -> Any:
    return tiny_model("llama", hidden_size=32, num_hidden_layers=1)


def run(folder: Path, **options: Any) -> Any:
    training = TrainingConfig(steps=6, checkpoint_every=2, evaluate_every=3)
    how = {"training": training, "batch_size": 2, "quiet": True, "valid": TEXTS[:2], **options}
    return distill(small(), tiny_model("llama"), TEXTS, folder=folder, **how)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize(("edit", "sentence"), [*LOGS, (row_without("forward_kl"), "row 1 is n")])
def test_the_log_of_a_student(tmp_path: Path, trained: Path, edit: Edit, sentence: str):
    folder = shutil.copytree(trained, tmp_path / "copy")
    edit(folder / "log.jsonl")
    with pytest.raises(InputError, match=sentence):
        run(folder)


@pytest.mark.parametrize(("edit", "sentence"), CHECKPOINTS)
def test_the_checkpoints_of_a_student(tmp_path: Path, trained: Path, edit: Edit, sentence: str):
    folder = shutil.copytree(trained, tmp_path / "copy")
    edit(folder)
    with pytest.raises(InputError, match=sentence):
        run(folder)
    shutil.rmtree(folder / "step-0000006")
    assert [row["step"] for row in run(folder).log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Path.unlink, r"the best network is lost: .*best/network\.safetensors is missing; remove"),
        (lambda path: path.write_bytes(b"x"), "the best network is lost: .* is damaged"),
        (lambda path: mx.save_safetensors(str(path), {"a": mx.array([1])}), "is damaged: it lacks"),
    ],
)
def test_the_best_network_of_a_student(tmp_path: Path, edit: Edit, sentence: str):
    how = TrainingConfig(steps=6, checkpoint_every=2, evaluate_every=1, keep_best=True)
    with pytest.raises(Killed):
        run(tmp_path, training=how, callback=KillAt(5))
    edit(tmp_path / "best" / "network.safetensors")
    with pytest.raises(InputError, match=sentence):
        run(tmp_path, training=how)
    assert not (tmp_path / "step-0000006").exists()


def test_what_a_kill_leaves_of_a_row_is_cut_off(tmp_path: Path, trained: Path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    path = folder / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole + b'{"step": \xff')  # rows of steps that are done again, too
    with pytest.raises(InputError, match="its steps are out of order"):
        run(folder)
    path.write_bytes(
        whole + whole.splitlines(keepends=True)[-1].replace(b'"step": 6', b'"step": 7')
    )
    with path.open("ab") as file:
        file.write(b'{"step": \xff')
    assert len(run(folder).log) == 6
    assert path.read_bytes() == whole


def test_without_a_checkpoint_there_is_no_log(tmp_path: Path):
    (tmp_path / "log.jsonl").write_bytes(b"\xff\n")
    assert Journal(tmp_path, 0).rows == []
    assert list(tmp_path.iterdir()) == []
    assert read_log(tmp_path / "log.jsonl", 0, [], []) == []


# --------------------------------------------------------------------------------- their own texts

OWN = OnPolicyConfig(1.0, rollout_every=2, rollout_texts=4, rollout_max_tokens=6)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training that was killed at step 5; steps 3 and 4 are kept, and what they read."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Killed):
        run(folder, on_policy=OWN, callback=KillAt(5))
    return folder


def line_one(**changes: Any) -> Edit:
    def edit(path: Path) -> None:
        first, *others = path.read_text().splitlines(keepends=True)
        path.write_text("".join([json.dumps(json.loads(first) | changes) + "\n", *others]))

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            Path.unlink,
            "is missing, of which texts are still to be learned; remove .* to begin anew",
        ),
        (lines(0, 1), "is damaged: it has 2 texts, not 4"),
        (line_one(row=77), "is damaged: line 1 goes on with no prompt of it"),
        (line_one(start=99), "is damaged: line 1 goes on"),
        (line_one(tokens=[5, 6, 7, 8, 9, 10**6]), "is damaged: line 1 goes on"),
        (line_one(tokens="text"), "is damaged: line 1 goes on"),
        (lambda path: path.write_text('{"a": 1}\n' * 4), "is damaged: line 1 goes on"),
        (lambda path: path.write_bytes(b"\xff\n"), "is not UTF-8 text"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "line 4: not JSON"),
    ],
)
def test_texts_that_a_student_wrote(tmp_path: Path, stopped: Path, edit: Edit, sentence: str):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    path = folder / "rollouts-0000002.jsonl"
    edit(path)
    with pytest.raises(InputError, match=rf"rollouts-0000002\.jsonl.*{sentence}"):
        run(folder, on_policy=OWN)
    assert not (folder / "step-0000006").exists()


def test_whole_texts_of_a_student_are_gone_on_with(tmp_path: Path, stopped: Path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    (folder / "rollouts-0000000.jsonl").unlink()  # no later step draws from it
    on = run(folder, on_policy=OWN)
    whole = run(tmp_path / "whole", on_policy=OWN)
    np.testing.assert_array_equal([r["loss"] for r in on.log], [r["loss"] for r in whole.log])
