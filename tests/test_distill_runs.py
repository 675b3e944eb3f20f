"""Runs of a distillation: their folders, what they write, their logs, rates and threads."""

import json
import math
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from distillers import (
    HALF,
    TEXTS,
    V,
    bits,
    make,
    make_texts,
    rows_of,
    run,
    small,
)
from interrupting import KillAt, Killed
from mlx import nn
from tiny_models import tiny_model

from mlx_distill import Distilled, Examples, InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.data.texts import Text, TextBatch, text_batch
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.distiller import Distiller
from mlx_distill.distillation.on_policy import OnPolicyConfig, Rollouts
from mlx_distill.distillation.teachers import (
    LiveTeacher,
)
from mlx_distill.distillation.training import distill
from mlx_distill.training import loop
from mlx_distill.training.best import kept_step
from mlx_distill.training.config import TrainingConfig

# ----------------------------------------------------------------------------------- a run's folder


Finished = tuple[Path, Distilled, dict[str, bytes]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return the folder of a run that met no obstacle, what it returned, and its student."""
    folder, student = tmp_path_factory.mktemp("finished"), small()
    return folder, run(folder, student, tiny_model("llama")), bits(student)


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Path:
    """Return a copy of that folder."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_finished_run_returns_its_result(tmp_path: Path) -> None:
    first, again = small(), small()
    expected = run(tmp_path, first, tiny_model("llama"), valid=TEXTS[:2])
    found = run(tmp_path, again, tiny_model("llama"), valid=TEXTS[:2])
    assert found == expected
    assert found.before["kl"] != found.log[-1]["held_out"]["kl"]
    assert bits(again) == bits(first)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"losses": "reverse_kl"}, "losses was"),
        ({"seed": 6}, "seed was 5, is 6"),
        ({"batch_size": 2}, "batch_size was 3, is 2"),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate was 0.01, is 0.001"),
        ({"texts": TEXTS[1:]}, "data was"),
        ({"on_policy": HALF}, "on_policy was None, is"),
        ({"teacher": tiny_model("llama-tied")}, "teachers.networks was"),
        ({"valid": TEXTS[:2]}, "valid was None, is"),
        ({"student": small(seed=4)}, "student_weights was"),
        ({"teacher": tiny_model("llama", seed=9)}, "teachers.networks was"),
        ({"valid_teacher": LiveTeacher([tiny_model("llama")])}, "valid_teacher was None, is"),
        ({"student": small(hidden_size=64)}, r"student.lm_head.weight was \[97, 32\], is"),
    ],
)
def test_run_with_other_arguments_does_not_go_on(
    folder: Path, options: dict[str, Any], changed: str
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = {"student": small(), "teacher": tiny_model("llama"), **options}
    with pytest.raises(InputError, match=rf"cannot resume with other settings: .*{changed}"):
        run(folder, **given)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_examples_are_other_data(tmp_path: Path) -> None:
    inputs, labels = mx.random.normal((8, 4)), mx.array([0, 1, 2, 0, 1, 2, 0, 1])
    for name, change in (("inputs", inputs + 1), ("labels", labels[::-1])):
        folder = tmp_path / name
        run(folder, nn.Linear(4, 3), nn.Linear(4, 3), Examples.of(inputs, labels))
        other = {"inputs": inputs, "labels": labels} | {name: change}
        with pytest.raises(InputError, match="other settings: data was"):
            run(folder, nn.Linear(4, 3), nn.Linear(4, 3), Examples.of(**other))


def test_checkpoints_without_settings_are_not_gone_on_with(folder: Path) -> None:
    (folder / "settings.json").unlink()
    with pytest.raises(InputError, match=r"holds checkpoints and no settings\.json"):
        run(folder, small(), tiny_model("llama"))


def test_damaged_checkpoint_is_named(
    folder: Path,
    finished: Finished,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = small()
    newest = folder / "step-0000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    run(folder, found, tiny_model("llama"))
    said = "step-0000006 is damaged; going on from step-0000004"
    assert said in capsys.readouterr().err
    assert bits(found) == finished[2]


def test_student_that_comes_to_nothing_on_held_out_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is measured before a step: the last step's damage shows in held-out texts only."""
    found = [{"nats": 3.0}, {"nats": 2.0}, {"nats": math.nan}]
    monkeypatch.setattr(Distiller, "evaluate", lambda *_: found.pop(0))
    message = r"held-out nats of step 6 is nan.* the last good checkpoint is .*step-0000004"
    with pytest.raises(InputError, match=message):
        run(tmp_path, small(), tiny_model("llama"), valid=TEXTS[:2])


# ---------------------------------------------------------------------------------- what it writes


def rollouts(folder: Path, student: Any, texts: Sequence[Text] = TEXTS, **options: Any) -> Rollouts:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"rollout_every": 4, "rollout_texts": 5, "rollout_max_tokens": 9}
    config = OnPolicyConfig(**{"on_policy": 1.0, **sizes, **options})
    return Rollouts(student, texts, lambda number: [number % 12, 1], 3, EOS, config, folder, 7)


EOS = set(range(0, V, 10))


def same(one: TextBatch, other: TextBatch) -> bool:
    return one.tokens.shape == other.tokens.shape and bool(
        (mx.array_equal(one.tokens, other.tokens) & mx.array_equal(one.mask, other.mask)).item()
    )


def test_batches_follow_from_step_and_weights(tmp_path: Path) -> None:
    student = small()
    first = [rollouts(tmp_path / "a", student).batch(n) for n in range(10)]
    mx.random.seed(99)
    again = rollouts(tmp_path / "b", small())
    assert all(same(again.batch(n), one) for n, one in enumerate(first))
    kept = rollouts(tmp_path / "a", small(seed=8))  # what was written stands
    assert all(same(kept.batch(n), one) for n, one in enumerate(first))
    other = rollouts(tmp_path / "c", tiny_model("llama"))
    assert not any(same(other.batch(n), one) for n, one in enumerate(first))
    assert student.training


def test_share_of_batches_that_the_student_writes(tmp_path: Path) -> None:
    none = rollouts(tmp_path / "0", small(), on_policy=0.0)
    assert [none.batch(n).rows for n in range(40)] == [[n % 12, 1] for n in range(40)]
    assert not list((tmp_path / "0").iterdir())
    every = rollouts(tmp_path / "1", small(), on_policy=1.0)
    assert all(every.batch(n).rows == [] for n in range(9))
    half = rollouts(tmp_path / "h", small(), on_policy=0.5, rollout_every=50)
    count = sum(half.batch(n).rows == [] for n in range(100))
    assert 35 < count < 65


def test_texts_end_where_the_student_ends_them(tmp_path: Path) -> None:
    writer = rollouts(tmp_path, small(), rollout_texts=12, rollout_prompt_tokens=4)
    writer.batch(0)
    rows = rows_of(tmp_path / "rollouts-0000000.jsonl")
    assert len(rows) == 12
    ended = 0
    for row in rows:
        answer = row["tokens"][row["start"] :]
        assert 1 <= len(answer) <= 9
        assert not any(token in EOS for token in answer[:-1])
        assert answer[-1] in EOS or len(answer) == 9
        ended += answer[-1] in EOS and len(answer) < 9
        begun = [t for t in TEXTS if t.tokens[: row["start"]] == row["tokens"][: row["start"]]]
        assert begun  # it continues one of the data
        start = begun[0].learned.index(True)
        assert row["start"] == (start if start > 1 else 4)
    assert ended


def test_masks_of_written_texts_begin_behind_the_prompt(tmp_path: Path) -> None:
    texts = [Text(text.tokens) for text in TEXTS]
    writer = rollouts(tmp_path, small(), texts, rollout_prompt_tokens=3, replay=1)
    batch = writer.batch(2)
    rows = rows_of(tmp_path / "rollouts-0000000.jsonl")
    for tokens, mask in zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True):
        (row,) = [row for row in rows if tokens[: len(row["tokens"])] == row["tokens"]]
        expected = [2 <= place < len(row["tokens"]) - 1 for place in range(len(mask))]
        assert [bool(one) for one in mask] == expected


def test_earlier_sets_are_replayed(tmp_path: Path) -> None:
    writer = rollouts(tmp_path, small(), replay=2, rollout_every=2, rollout_texts=3)
    for number in range(7):
        writer.batch(number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"rollouts-000000{n}.jsonl" for n in (0, 2, 4, 6)]
    sets = {name: [tuple(row["tokens"]) for row in rows_of(tmp_path / name)] for name in names}
    seen = set()
    for number in range(20, 24):  # nothing was written at 18: only the last set is there
        batch = writer.batch(number)
        seen |= {tuple(t for t in row if t) for row in batch.tokens.tolist()}
    assert not seen & {tuple(t for t in x if t) for x in sets[names[0]]}
    both = set()
    for number in (6, 7):
        both |= {tuple(t for t in row if t) for row in writer.batch(number).tokens.tolist()}
    known = {tuple(t for t in x if t) for name in names[2:] for x in sets[name]}
    assert both <= known


def test_killed_training_on_its_own_texts_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Killed twice: before there is a checkpoint, and behind the first one."""
    options: dict[str, Any] = {
        "losses": ["reverse_kl", "hidden_mse:weight=0.1"],
        "on_policy": OnPolicyConfig(
            on_policy=0.6, rollout_every=3, rollout_texts=4, rollout_max_tokens=6
        ),
        "eos_token_ids": [0],
        "valid": TEXTS[:2],
        "training": {"steps": 8, "accumulate": 2, "checkpoint_every": 3},
    }
    whole = small()
    expected = run(tmp_path / "whole", whole, tiny_model("llama"), **options)
    for step in (2, 5):
        with pytest.raises(Killed):
            run(tmp_path / "parts", small(), tiny_model("llama"), callback=KillAt(step), **options)
        mx.random.seed(123 + step)
    parts = small()
    done = run(tmp_path / "parts", parts, tiny_model("llama"), **options)
    assert bits(parts) == bits(whole)
    assert done.log == expected.log
    written = sorted(path.name for path in (tmp_path / "whole").glob("rollouts-*"))
    assert len(written) > 2
    for name in written:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"on_policy": 1.5}, "on_policy must be between 0 and 1, got 1.5"),
        ({"on_policy": -0.1}, "on_policy must be at least 0, got -0.1"),
        ({"rollout_every": 0}, "rollout_every must be at least 1, got 0"),
        ({"rollout_texts": 0}, "rollout_texts must be at least 1, got 0"),
        ({"rollout_prompt_tokens": 0}, "rollout_prompt_tokens must be at least 1, got 0"),
        ({"rollout_max_tokens": 0}, "rollout_max_tokens must be at least 1, got 0"),
        ({"replay": 0}, "replay must be at least 1, got 0"),
        (
            {"rollout_temperature": -1.0},
            "rollout_temperature must be 0, or between 1e-6 and 100",
        ),
    ],
)
def test_settings_of_rollouts_that_mean_nothing(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        OnPolicyConfig(**fields)


# ---------------------------------------------------------------------------------------- the log


class Recorder:
    """Keeps what mlx-lm's callbacks are told."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.val: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.val.append(info)


def test_callbacks_are_told_what_mlx_lm_tells(tmp_path: Path) -> None:
    heard = Recorder()
    done = run(tmp_path, small(), tiny_model("llama"), valid=TEXTS[:3], callback=heard)
    assert [info["iteration"] for info in heard.train] == [1, 2, 3, 4, 5, 6]
    keys = {"iteration", "train_loss", "learning_rate", "iterations_per_second"}
    keys |= {"tokens_per_second", "trained_tokens", "peak_memory"}
    assert all(keys | {"forward_kl"} == set(info) for info in heard.train)
    assert [info["train_loss"] for info in heard.train] == [row["loss"] for row in done.log]
    counts = np.cumsum([row["count"] for row in done.log])
    assert [info["trained_tokens"] for info in heard.train] == counts.tolist()
    assert [info["iteration"] for info in heard.val] == [3, 6]
    assert all(
        {"iteration", "val_loss", "nats", "kl", "agreement", "perplexity"} == set(info)
        for info in heard.val
    )
    assert heard.val[-1]["val_loss"] == done.log[-1]["held_out"]["nats"]


def test_judging_and_saving_are_no_part_of_a_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in mlx-lm; steps with an evaluation had a fraction of the others' tokens per second."""
    heard, clock = Recorder(), [0.0]

    def taking(seconds: float, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return call(*args, **options)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Distiller, "teach", taking(2, Distiller.teach))
    monkeypatch.setattr(Distiller, "evaluate", taking(50, Distiller.evaluate))
    monkeypatch.setattr(loop, "save", taking(90, loop.save))
    done = run(tmp_path, small(), tiny_model("llama"), valid=TEXTS[:3], callback=heard)
    assert [info["iterations_per_second"] for info in heard.train] == [0.5] * 6
    rates = [info["tokens_per_second"] for info in heard.train]
    assert rates == [row["count"] / 2 for row in done.log]


@pytest.mark.parametrize("seed", [5, 2**40 + 5])
def test_the_random_state_is_left_as_it_was(tmp_path: Path, seed: int) -> None:
    """What an app drew after a training followed from the training's seed, every time alike."""
    student, teacher = small(), tiny_model("llama")
    mx.random.seed(seed)
    mx.random.uniform()
    expected = mx.random.state[0].tolist()
    run(tmp_path, student, teacher)
    assert mx.random.state[0].tolist() == expected


@pytest.mark.parametrize("step", [4, 5])
def test_killed_training_counts_on(tmp_path: Path, step: int) -> None:
    """Neither the log nor the number of tokens begins again; step 3 was logged, and not kept."""
    whole = run(tmp_path / "whole", small(), tiny_model("llama"), valid=TEXTS[:2])
    with pytest.raises(Killed):
        run(
            tmp_path / "parts", small(), tiny_model("llama"), valid=TEXTS[:2], callback=KillAt(step)
        )
    heard = Recorder()
    done = run(tmp_path / "parts", small(), tiny_model("llama"), valid=TEXTS[:2], callback=heard)
    assert done.log == whole.log
    done_before = 2 if step == 4 else 4
    assert [info["iteration"] for info in heard.train] == list(range(done_before + 1, 7))
    total = sum(row["count"] for row in whole.log)
    assert heard.train[-1]["trained_tokens"] == total
    assert rows_of(tmp_path / "parts" / "log.jsonl") == done.log


def test_a_log_that_a_kill_cut_goes_on(tmp_path: Path, finished: Finished) -> None:
    whole = finished[1]
    with pytest.raises(Killed):
        run(tmp_path / "parts", small(), tiny_model("llama"), callback=KillAt(5))
    log = tmp_path / "parts" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-7])
    assert run(tmp_path / "parts", small(), tiny_model("llama")).log == whole.log
    assert rows_of(log) == whole.log


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    """The second one is told, and leaves the first one's files alone."""

    class Second:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 3:
                with pytest.raises(InputError, match="is being written by another run"):
                    run(tmp_path, small(), tiny_model("llama"))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    done = run(tmp_path, small(), tiny_model("llama"), callback=Second())
    assert [row["step"] for row in done.log] == [1, 2, 3, 4, 5, 6]


def test_the_best_weights_are_kept_and_patience_ends(tmp_path: Path) -> None:
    """A rate that is far too high: the first evaluation is the best one."""
    steps = {"steps": 30, "learning_rate": 3e-2, "evaluate_every": 2, "checkpoint_every": 50}
    training = {**steps, "patience": 2, "keep_best": True, "warmup": 1.0}
    student = small()
    done = run(tmp_path, student, tiny_model("llama"), valid=make_texts(6, 9), training=training)
    judged = {row["step"]: row["held_out"]["kl"] for row in done.log if "held_out" in row}
    best = min(judged, key=lambda step: judged[step])
    assert done.finished
    assert done.log[-1]["step"] == best + 4 < 30
    assert kept_step(done.log, TrainingConfig(**training)) == best
    assert kept_step(done.log, TrainingConfig()) == best + 4
    again = small()
    found = run(tmp_path, again, tiny_model("llama"), valid=make_texts(6, 9), training=training)
    assert found.log == done.log
    assert bits(again) == bits(student)
    teacher = LiveTeacher([tiny_model("llama")])
    made = make(["forward_kl"], text_batch(TEXTS, [0]), student, teacher)
    kl = made.evaluate([text_batch(make_texts(6, 9), list(range(6)))])["kl"]
    assert kl == pytest.approx(judged[best], rel=1e-4)
    with pytest.raises(InputError, match="patience and keep_best need held-out data"):
        run(tmp_path / "other", small(), tiny_model("llama"), training=training)


# -------------------------------------------------------------- rates, scales of terms, two threads


@pytest.mark.parametrize(
    ("trained", "rate"),
    [("new weights", 1e-3), ("chosen layers", 2.5e-4), (None, 3e-5), ("adapters", 1e-4)],
)
def test_learning_rate_by_what_is_trained(tmp_path: Path, trained: str | None, rate: float) -> None:
    student = small()
    if trained == "adapters":
        AdapterConfig(fine_tune="lora").apply(student)
    training = TrainingConfig(steps=1, warmup=1.0)
    said = None if trained == "adapters" else trained
    options = {"folder": tmp_path, "training": training, "quiet": True, "trained": said}
    (row,) = distill(student, tiny_model("llama"), TEXTS, **options).log
    assert row["learning_rate"] == pytest.approx(rate)


def test_learning_rate_of_a_classifier(tmp_path: Path) -> None:
    data = Examples.of(mx.random.normal((4, 4)), mx.array([0, 1, 2, 0]))
    training = TrainingConfig(steps=1, warmup=1.0)
    done = distill(
        nn.Linear(4, 3), nn.Linear(4, 3), data, folder=tmp_path, training=training, quiet=True
    )
    assert done.log[0]["learning_rate"] == pytest.approx(1e-3)


def test_a_term_that_drowns_another_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = ["forward_kl", "hard:weight=0.001"]
    done = run(tmp_path / "one", small(), tiny_model("llama"), losses=losses, quiet=False)
    first = done.log[0]
    share = first["forward_kl"] / (first["forward_kl"] + 0.001 * first["hard"])
    assert f"forward_kl {share:.1%}, hard {1 - share:.1%}" in capsys.readouterr().err
    (note,) = done.notes
    assert note.startswith(f"forward_kl was {share:.1%} of the first step's loss and hard ")
    balanced = ["forward_kl", f"hard:weight={first['forward_kl'] / first['hard'] / 5}"]
    assert not run(tmp_path / "two", small(), tiny_model("llama"), losses=balanced).notes


def test_a_training_in_another_thread_is_refused(tmp_path: Path, finished: Finished) -> None:
    """MLX's random state is the process's: what one draws, the other would not."""
    said: list[str] = []

    def second() -> None:
        with pytest.raises(InputError) as refusal:
            run(tmp_path / "second", small(), tiny_model("llama"))
        said.append(str(refusal.value))

    class Starting:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 3:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    done = run(tmp_path / "first", small(), tiny_model("llama"), callback=Starting())
    assert done == finished[1]
    assert "another thread of this process is training" in said[0]
    assert not (tmp_path / "second").exists()


def test_the_example_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    guide = (root / "docs" / "distillation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "models").symlink_to(bundled("stories-4m").parent)
    (tmp_path / "texts").mkdir()
    for name, text in (("train", "Once upon a time"), ("valid", "There was a girl")):
        row = json.dumps({"text": text}) + "\n"
        (tmp_path / "texts" / f"{name}.jsonl").write_text(row)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace("steps=20", "steps=1"), found)
    assert found["done"].finished
    written, _ = mlx_lm.load("student")
    assert bits(written).keys() == bits(found["student"]).keys()
