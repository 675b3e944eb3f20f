"""What a user names is one path everywhere: ``~`` is the home folder, and what is none is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelIn
from half_models import REFERENCE

import mlx_distill
from mlx_distill import InputError, convert, train_drafter
from mlx_distill.cli import new_file
from mlx_distill.data.sources import read_rows
from mlx_distill.distillation.answer_files import read_answers
from mlx_distill.distillation.answer_writing import write_answers
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.evaluation.judging import check_material
from mlx_distill.files import new_path, output_path, usable_path
from mlx_distill.training.config import TrainingConfig

NO_OUTPUTS = ["", ".", "/", "..", "~nobody-of-this-name/a", None, 5, b"a"]
CONFIG = DrafterTraining(
    held_out=1,
    starts=8,
    exit_dim=16,
    draft_vocab_size=64,
    training=TrainingConfig(steps=1),
    responses=ResponseConfig(max_tokens=4),
)
PROMPTS = [[1, 5, 7], [1, 9, 4], [1, 8]]


@pytest.fixture(scope="module")
def folder(model_in: ModelIn) -> str:
    return str(model_in("tiny", "float32"))


@pytest.fixture(scope="module")
def pair(folder: str) -> tuple[Any, Any]:
    return mlx_distill.load(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home folder, beside the one that commands run in."""
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    return home


def answers_in(path: Path) -> Path:
    rows = {"prompt_len": np.array([2] * 4), "answer_len": np.array([4] * 4)}
    tokens = {"prompt": np.array([1, 5] * 4), "answer": np.arange(3, 19)}
    np.savez(path, greedy=np.array([True] * 4), **rows, **tokens)
    return path


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", NO_OUTPUTS)
def test_what_is_no_output_is_refused_before_anything_is_done(
    home: Path, pair: tuple[Any, Any], name: Any
):
    ways: list[Callable[[], Any]] = [
        lambda: output_path(name),
        lambda: new_path(name),
        lambda: mlx_distill.train_drafter(*pair, PROMPTS, name, CONFIG),
        lambda: write_answers(*pair, PROMPTS, name, CONFIG.responses),
        lambda: mlx_distill.quantize_drafter(REFERENCE, name),
    ]
    for way in ways:
        with pytest.raises(InputError, match="the output "):
            way()
    assert not list(home.parent.rglob("*.partial"))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", [None, 5, b"a", "", "~nobody-of-this-name/a"])
def test_what_is_no_path_is_refused(pair: tuple[Any, Any], tmp_path: Path, name: Any):
    ways: list[Callable[[], Any]] = [
        lambda: usable_path(name, "the data"),
        lambda: read_answers(name),
        lambda: list(read_rows(name)),
        lambda: mlx_distill.distill(pair[0], None, [], folder=name),
    ]
    for way in ways:
        with pytest.raises(InputError, match=r"the (data|file of answers|folder) "):
            way()
    if name is not None:
        output = tmp_path / "drafter"
        for option in ({"features": name}, {"responses": name}):
            with pytest.raises(InputError, match=r"the (folder of features|output) "):
                mlx_distill.train_drafter(*pair, PROMPTS, output, CONFIG, **option)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["smaller", "published", "ours"])
@pytest.mark.parametrize("output", [".", "/", ".."])
def test_a_conversion_needs_a_name(
    home: Path, output: str, to: str, capsys: pytest.CaptureFixture[str]
):
    flags = ["--drafter", str(home), "--output", output, "--to", to]
    if to == "smaller":
        flags += ["--answers", str(answers_in(home / "answers.npz"))]
    assert convert.main(flags) == 2
    assert f"the output {output} is no name of a new file or folder" in capsys.readouterr().err


def test_the_home_folder_is_meant_everywhere(
    home: Path, folder: str, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": text} for text in ("Once upon a time", "Lily went", "One day")]
    (home / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = ["--model", folder, "--exit-dim", "32", "--draft-vocab-size", "64", "--held-out", "1"]
    tiny += ["--steps", "1", "--starts", "8", "--max-tokens", "6", "--quiet", "--data", "~/p.jsonl"]
    kept = ["--responses", "~/kept.jsonl", "--features", "~/features"]
    assert train_drafter.main([*tiny, *kept, "--output", "~/drafter"]) == 0
    assert train_drafter.main([*tiny, "--write-answers", "~/answers.npz"]) == 0
    assert read_answers("~/answers.npz").num_tokens
    check_material("~/answers.npz")
    ways = ["--model", folder, "--drafter", "~/drafter", "--answers", "~/answers.npz"]
    assert convert.main([*ways, "--output", "~/small", "--bits", "4"]) == 0
    assert "the drafter is in ~/small" in capsys.readouterr().out
    names = {"drafter", "kept.jsonl", "features", "answers.npz", "small", "p.jsonl"}
    assert names <= {path.name for path in home.iterdir()}
    assert not list((home.parent / "here").iterdir())
    with pytest.raises(InputError, match="exists; name another"):
        new_file("~/answers.npz")
    assert convert.main([*ways, "--output", "~/small", "--bits", "4"]) == 2
