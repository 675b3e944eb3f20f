"""Features on disk: the same in every epoch, of these weights alone, and only where they fit."""

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from damage import Run

import mlx_distill
from mlx_distill import benchmark, train_drafter
from mlx_distill.data.texts import Text
from mlx_distill.distillation.feature_store import FeatureStore
from mlx_distill.distillation.target_reader import TargetReader
from mlx_distill.errors import InputError
from mlx_distill.target.target import Target

KNOWN = {"hidden_size": 64, "weights_hash": "a"}
GROUPS = [
    [Text.behind([3, 5, 7, 11, 13], 2), Text.behind([3, 8, 9], 1)],
    [Text.behind([3, 6, 7, 11, 13, 15, 17], 3)],
]
Arrays = dict[str, mx.array]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16", "q4"])
def reader(model_in: ModelIn, request: pytest.FixtureRequest) -> TargetReader:
    model, _ = mlx_distill.load(model_in("tiny", request.param))
    return TargetReader(Target.of(model), (0, 1), 4)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def test_features_are_those_that_are_computed(reader: TargetReader, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features", reader, GROUPS, KNOWN)
    assert store.num_missing == 3 + 2 + 4
    for number, texts in enumerate(GROUPS):
        found, again, expected = store.view(number), store.view(number), reader.view(texts)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.ahead.tolist() == expected.ahead.tolist()
        for one, other, right in zip(
            (found.hidden, found.goals, *found.taps),
            (again.hidden, again.goals, *again.taps),
            (expected.hidden, expected.goals, *expected.taps),
            strict=True,
        ):
            assert mx.array_equal(one, other)
            assert one.dtype == right.dtype
            np.testing.assert_allclose(numbers(one), numbers(right), rtol=2**-8, atol=1e-6)
    assert FeatureStore(tmp_path / "features", reader, GROUPS, KNOWN).num_missing == 0


def test_what_is_there_is_not_computed_again(
    reader: TargetReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FeatureStore(tmp_path, reader, GROUPS, KNOWN).view(1)
    store = FeatureStore(tmp_path, reader, GROUPS, KNOWN)
    assert store.num_missing == 5
    asked = []
    view = reader.view
    monkeypatch.setattr(reader, "view", lambda texts: asked.append(texts) or view(texts))
    for number in (1, 0, 1, 0):
        store.view(number)
    assert asked == [GROUPS[0]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": KNOWN | {"weights_hash": "b"}}, "of another model, or of other weights"),
        ({"groups": GROUPS[:1]}, "of other answers"),
        ({"groups": GROUPS[::-1]}, "of other answers"),
    ],
)
def test_other_features_are_refused(
    reader: TargetReader, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    FeatureStore(tmp_path, reader, GROUPS, KNOWN).view(0)
    arguments = {"reader": reader, "groups": GROUPS, "target": KNOWN} | change
    with pytest.raises(InputError, match=sentence):
        FeatureStore(tmp_path, **arguments)
    other = TargetReader(reader.target, (1,), 4)
    with pytest.raises(InputError, match="of other layers"):
        FeatureStore(tmp_path, other, GROUPS, KNOWN)


def test_damage_is_named(reader: TargetReader, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, reader, GROUPS, KNOWN)
    store.view(0)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"group-00000.safetensors is damaged"):
        store.view(0)
    (tmp_path / "features.json").unlink()
    with pytest.raises(InputError, match="something else"):
        FeatureStore(tmp_path, reader, GROUPS, KNOWN)


DAMAGE: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "fewer rows": (
        lambda of: {name: array[:3] for name, array in of.items()},
        "its array tokens is I32 of shape [3], not I32 of shape [5]",
    ),
    "fewer rows of one": (
        lambda of: of | {"hidden": of["hidden"][:3]},
        "its array hidden is BF16 of shape [3, 64], not BF16 or F16 of shape [5, 64]",
    ),
    "narrow": (
        lambda of: of | {"tap-1": of["tap-1"][:, :9]},
        "its array tap-1 is BF16 of shape [5, 9]",
    ),
    "another type": (
        lambda of: of | {"tokens": of["tokens"].astype(mx.float32)},
        "its array tokens is F32 of shape [5]",
    ),
    "whole numbers": (
        lambda of: of | {"hidden": of["hidden"].astype(mx.int16)},
        "its array hidden is I16 of shape [5, 64]",
    ),
    "other tokens": (
        lambda of: of | {"tokens": of["tokens"] + 10**6},
        "its array tokens is not that of the answers",
    ),
    "none ahead": (
        lambda of: of | {"ahead": of["ahead"] * 0},
        "its array ahead is not that of the answers",
    ),
    "one less": (lambda of: {k: of[k] for k in of if k != "tap-0"}, "it lacks tap-0"),
    "one more": (lambda of: of | {"goals": of["hidden"]}, "it also holds goals"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_features_that_do_not_fit_their_answers(
    model_in: ModelIn, tmp_path: Path, case: str
) -> None:
    """None of them is used: what lies behind an array's end would be read all the same."""
    model, _ = mlx_distill.load(model_in("tiny", "float32"))
    reader = TargetReader(Target.of(model), (0, 1), 1, look_back=0)
    store = FeatureStore(tmp_path, reader, GROUPS, KNOWN)
    store.view(0)
    [path] = tmp_path.glob("*.safetensors")
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    damage, sentence = DAMAGE[case]
    mx.save_safetensors(str(path), damage(arrays), {"format": "mlx"})
    told = re.escape(f"{path} is damaged: {sentence}") + ".*; remove it, and it is computed anew"
    with pytest.raises(InputError, match=told):
        store.view(0)
    with pytest.raises(InputError, match=told):  # before anything is trained
        FeatureStore(tmp_path, reader, GROUPS, KNOWN)
    path.unlink()
    assert FeatureStore(tmp_path, reader, GROUPS, KNOWN).view(0).tokens.size == 5


@pytest.mark.parametrize("look_back", [0, 2])
def test_rows_are_those_of_a_view(model_in: ModelIn, look_back: int) -> None:
    model, _ = mlx_distill.load(model_in("tiny", "float32"))
    reader = TargetReader(Target.of(model), (), 2, look_back)
    texts = [text for group in GROUPS[::-1] for text in group]
    tokens, ahead = reader.rows(texts)
    view = reader.view(texts)
    assert (tokens.tolist(), ahead.tolist()) == (view.tokens.tolist(), view.ahead.tolist())
    assert len(tokens) == sum(map(reader.num_rows, texts))


def test_damaged_features_end_a_training_before_it_begins(
    flags: list[str], tmp_path: Path, refused: Run
) -> None:
    features = tmp_path / "features"
    plain = trained(flags, tmp_path, "first", "--features", features)
    *_, path = sorted(features.glob("group-*.safetensors"))
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    short = {name: array[:1] for name, array in arrays.items()}
    mx.save_safetensors(str(path), short, {"format": "mlx"})
    again = [*flags, "--output", tmp_path / "second", "--features", features]
    assert f"{path} is damaged" in refused(train_drafter.main, *again, alone=False)
    assert not (tmp_path / "second.partial").exists()
    path.unlink()
    assert trained(flags, tmp_path, "second", "--features", features) == plain


@pytest.fixture(scope="module")
def flags(model_in: ModelIn) -> list[str]:
    return [
        *("--model", str(model_in("tiny", "float16")), "--data", str(benchmark.PROMPTS)),
        *("--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "2", "--batch-size", "2"),
        *("--max-tokens", "6", "--held-out", "1", "--max-prompts", "6", "--prompt-tokens", "5"),
        *("--quiet", "--starts", "8", "--epochs", "2", "--feature-gb", "1e-5"),
    ]


def trained(flags: list[str], folder: Path, name: str, *more: Any) -> bytes:
    output = folder / name
    assert train_drafter.main([*flags, "--output", str(output), *map(str, more)]) == 0
    return (output / "model.safetensors").read_bytes()


def test_a_training_from_kept_features_is_the_same(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], as_on_a_gpu: None
) -> None:
    """In half precision nothing is rounded: kept or not, twice or not."""
    features = tmp_path / "features"
    plain = trained(flags, tmp_path, "plain")
    assert trained(flags, tmp_path, "first", "--features", features) == plain
    assert len(list(features.glob("group-*.safetensors"))) > 1
    capsys.readouterr()
    assert trained(flags, tmp_path, "second", "--features", features) == plain
    assert "0.00 GB are not there yet" in capsys.readouterr().err


def test_a_disk_that_is_too_small(
    flags: list[str], tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    output = ["--output", tmp_path / "drafter", "--features", tmp_path / "features"]
    sentence = refused(train_drafter.main, *flags, *output, alone=False)
    assert "the features need" in sentence
    assert "has 0.00 GB left" in sentence
    assert list(tmp_path.iterdir()) == []


def test_features_of_other_weights(
    flags: list[str], tmp_path: Path, refused: Run, model_in: ModelIn
) -> None:
    features = tmp_path / "features"
    trained(flags, tmp_path, "first", "--features", features)
    before = {path.name for path in tmp_path.iterdir()}
    other = [*flags, "--model", model_in("tiny", "q4"), "--output", tmp_path / "other"]
    sentence = refused(train_drafter.main, *other, "--features", features, alone=False)
    assert "of another model, or of other weights" in sentence
    assert {path.name for path in tmp_path.iterdir()} - before <= {"other.responses.jsonl"}
