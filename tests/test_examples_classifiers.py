"""The classifiers' examples run end to end, tiny, on images that are made up."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_distill

EXAMPLES = Path(__file__).parent.parent / "examples"
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
FLAGS = ["--steps", "4", "--train", "64", "--test", "64"]


def write_images(folder: Path, shape: tuple[int, ...], classes: list[str] | None) -> Path:
    """Write noise around a pattern per class, with every class in every split."""
    draw = np.random.default_rng(0)
    num_classes = len(classes) if classes else 10
    patterns = draw.integers(0, 200, (num_classes, *shape))
    for name, count in (("train-00", 120), ("train-01", 80), ("test-00", 100)):
        y = np.arange(count) % num_classes
        x = patterns[y] + draw.integers(0, 56, (count, *shape))
        names = {"classes": np.array(classes)} if classes else {}
        np.savez(folder / f"{name}.npz", x=x.astype(np.uint8), y=y.astype(np.uint8), **names)
    return folder


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return write_images(tmp_path, (32, 32, 3), ANIMALS)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_images(tmp_path, (28, 28), None)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports an example as it is imported when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(module: Any, data: Path, *flags: str) -> dict[str, Any]:
    """Run an example; return its JSON, which says where it comes from."""
    path = data / "results.json"
    assert module.main(["--data", str(data), "--json", str(path), *FLAGS, *flags]) == 0
    result = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert {"machine", "versions", "commit", "wall_s", "cpu_s", "settings"} <= result.keys()
    assert result["settings"]["test"] == 64
    return result


def check_runs(runs: dict[str, Any], seeds: int) -> None:
    assert len(runs["values"]) == seeds
    assert all(map(math.isfinite, runs["values"]))
    assert runs["mean"] == pytest.approx(sum(runs["values"]) / seeds)
    assert (runs["spread"] is None) == (seeds == 1)


def test_images_end_to_end(example: Any, animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(example("distill_images"), animals, "--seeds", "1")
    assert list(result["students"]) == ["plain", "response", "feature", "relation"]
    for one in result["students"].values():
        check_runs(one["accuracy"], 1)
        check_runs(one["kl"], 1)
    large, small = result["settings"]["parameters"]
    assert small <= large / 10
    assert list(result["soft_targets"]["probs"]) == ["1", "4", "20"]
    for probs in result["soft_targets"]["probs"].values():
        assert sum(probs) == pytest.approx(1, abs=1e-5)
    printed = capsys.readouterr().out
    assert "cow-like" in printed
    assert "one seed does not tell" in printed


def test_images_of_two_classes_are_one_and_others_are_dropped(example: Any, animals: Path) -> None:
    module = example("distill_images")
    train, _, names = example("classifiers").load_splits(animals, tune=False)
    data = module.animals(*train, names, None)
    counts = np.bincount(np.array(data.labels), minlength=4)
    per_class = 200 // 6
    assert module.CLASSES[int(counts.argmax())] == "cow-like"
    assert abs(counts[2] - 2 * per_class) <= 2
    assert counts.sum() == 200 - sum(n % 6 == 4 for n in [*range(120), *range(80)])


def test_ensemble_end_to_end(
    example: Any, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(example("ensemble_to_one"), digits, "--seeds", "2")
    assert result["settings"]["labelled"] == 64
    assert result["settings"]["unlabelled"] == 200 - 64
    assert len(result["teachers"]) == 3
    assert 0 <= result["ensemble"] <= 1
    assert len(result["students"]) == 3
    for one in result["students"].values():
        check_runs(one["accuracy"], 2)
        check_runs(one["kl"], 2)
    assert "ensemble of 3" in capsys.readouterr().out


def test_hinton_end_to_end(example: Any, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(example("digits_hinton"), digits, "--seeds", "1")
    settings = result["settings"]
    assert settings["held_out"] == 64 - 53
    assert settings["transfer"] == 53 - sum(n % 10 == 3 for n in range(53))
    assert settings["test_3s"] == sum(n % 10 == 3 for n in range(64))
    assert 0 <= result["teacher"]["on_3s"] <= result["teacher"]["errors"] <= 64
    for one in result["students"].values():
        for runs in one.values():
            check_runs(runs, 1)
    assert "no student ever saw" in capsys.readouterr().out


def test_tuning_judges_by_training_images_that_are_not_learned(example: Any, digits: Path) -> None:
    classifiers = example("classifiers")
    images, labels, _ = classifiers.load_images(digits, "train")
    learned, judged, names = classifiers.load_splits(digits, tune=True)
    assert [len(learned[0]), len(judged[0])] == [len(images) * 5 // 6, -(-len(images) // 6)]
    assert np.array_equal(np.concatenate([learned[0], judged[0]]), images)
    assert np.array_equal(np.concatenate([learned[1], judged[1]]), labels)
    test = classifiers.load_images(digits, "test")
    plain = classifiers.load_splits(digits, tune=False)
    assert np.array_equal(plain[1][0], test[0])
    assert names == plain[2]


def test_raised_bias_gives_the_class_its_frequency(example: Any) -> None:
    module = example("digits_hinton")
    draw = np.random.default_rng(1)
    logits = draw.normal(size=(500, 10))
    logits[:, 3] -= 7
    labels = np.arange(500) % 10
    assert (module.called(logits, 0) == 3).sum() == 0
    bias = module.raised_bias(logits, labels)
    assert (module.called(logits, bias) == 3).sum() == 50


def test_jitter_depends_on_the_batch_number_alone(example: Any) -> None:
    classifiers = example("classifiers")
    images = np.random.default_rng(2).integers(0, 255, (8, 6, 6, 1), np.uint8)
    batch = classifiers.as_examples(images, np.zeros(8, np.int32))
    augment = classifiers.jitter(1, flip=True)
    first, again, other = (np.array(augment(batch, number).inputs) for number in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    assert (np.array(classifiers.jitter(0)(batch, 3).inputs) == images).all()


def test_errors_are_sentences(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("digits_hinton")
    assert module.main(["--data", str(tmp_path)]) == 2
    assert "holds no train*.npz" in capsys.readouterr().err
    assert module.main(["--data", str(tmp_path), "--seeds", "0"]) == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    assert module.main(["--data", str(tmp_path), "--rate", "0"]) == 2
    assert "rate must lie between 0 and 1, got 0.0" in capsys.readouterr().err
    assert module.main(["--data", str(tmp_path), "--json", str(tmp_path / "no" / "f")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    np.savez(tmp_path / "train.npz", x=np.zeros((3, 28, 28), np.uint8))
    assert module.main(["--data", str(tmp_path)]) == 2
    assert "must hold images x and as many labels y" in capsys.readouterr().err
    write_images(tmp_path, (8, 8, 3), ["frog", "toad"])
    assert example("distill_images").main(["--data", str(tmp_path)]) == 2
    (tmp_path / "train.npz").unlink()
    assert example("distill_images").main(["--data", str(tmp_path)]) == 2
    assert "have none of bird, cat, dog, deer, horse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arrays", "sentence"),
    [
        ("digits_hinton", None, "train.npz cannot be read as arrays"),
        ("digits_hinton", {"classes": np.array([{}])}, "train.npz cannot be read as arrays"),
        ("digits_hinton", {"y": np.arange(60) % 3}, "have no 3 to leave out, only 3 classes"),
        ("digits_hinton", {"x": np.zeros((60, 64))}, "must hold images x of one size"),
        ("digits_hinton", {"y": np.arange(60) - 1}, "the train images have the label -1"),
        ("ensemble_to_one", {"x": np.zeros((60, 7, 7))}, "must have even sides, got 7 x 7"),
    ],
)
def test_files_that_hold_no_images(
    name: str,
    arrays: dict[str, Any] | None,
    sentence: str,
    example: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"x": np.zeros((60, 8, 8), np.uint8), "y": np.arange(60) % 10}
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", **(good | (arrays or {})))
    if arrays is None:
        (tmp_path / "train.npz").write_bytes(b"PK\x03\x04")
    flags = ["--data", str(tmp_path), "--seeds", "1", "--steps", "1", "--train", "30"]
    assert example(name).main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_class_that_is_tested_and_not_learned(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, classes in (("train", 5), ("test", 9)):
        labels = np.arange(60) % classes
        np.savez(tmp_path / f"{split}.npz", x=np.zeros((60, 8, 8), np.uint8), y=labels)
    assert example("digits_hinton").main(["--data", str(tmp_path), "--steps", "1"]) == 2
    assert "the test images have the label 5" in capsys.readouterr().err


def test_a_killed_run_with_dropout_ends_with_the_same_bits(example: Any, tmp_path: Path) -> None:
    classifiers = example("classifiers")
    draw = np.random.default_rng(4)
    images = draw.integers(0, 255, (32, 4, 4, 1), np.uint8)
    data = classifiers.as_examples(images, draw.integers(0, 3, 32).astype(np.int32))

    class Killer:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 5:
                raise RuntimeError("killed")

        def on_val_loss_report(self, info: dict[str, Any]) -> None: ...

    def trained(folder: str, callback: Any = None) -> dict[str, Any]:
        mx.random.seed(5)
        student = classifiers.Perceptron((16, 8, 3), 0.5)
        mlx_distill.distill(
            student,
            None,
            data,
            folder=tmp_path / folder,
            losses=["hard"],
            training=mlx_distill.TrainingConfig(steps=8, checkpoint_every=3),
            batch_size=8,
            callback=callback,
            quiet=True,
        )
        return dict(tree_flatten(student.parameters()))

    whole = trained("whole")
    with pytest.raises(RuntimeError, match="killed"):
        trained("killed", Killer())
    again = trained("killed")
    assert all(mx.array_equal(again[name], array) for name, array in whole.items())
