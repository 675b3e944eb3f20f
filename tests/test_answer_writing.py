"""Answers alone: written as a file that a training takes, wherever the writing was stopped."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from damage import Run

from mlx_distill import benchmark, train_drafter
from mlx_distill.distillation import responses
from mlx_distill.distillation.answer_files import read_answers

PROMPTS = ["--data", str(benchmark.PROMPTS), "--prompt-tokens", "6", "--max-prompts", "40"]
WRITING = [
    *("--max-tokens", "8", "--temperatures", "0", "0.8", "--response-batch-size", "4", "--quiet"),
]


@pytest.fixture(scope="module")
def model(model_in: ModelIn) -> list[str]:
    return ["--model", str(model_in("tiny", "bfloat16"))]


@pytest.fixture(scope="module")
def written(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "answers.npz"
    flags = [*model, *PROMPTS, *WRITING, "--write-answers", str(path)]
    assert train_drafter.main(flags) == 0
    return path


def test_the_file_holds_every_answer(written: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["answers.npz"]
    answers = read_answers(written)
    assert answers.greedy == [True, False] * 20
    assert {len(one.prompt) for one in answers.responses} <= {1, 2, 3, 4, 5, 6}
    assert answers.target["weights_type"] == "float32"
    assert answers.target["template_hash"] == ""
    with np.load(written) as arrays:
        ended = arrays["ended"]
    for one, whole in zip(answers.responses, ended, strict=True):
        assert whole or len(one.response) == 8


def test_a_drafter_learns_from_it(model: list[str], written: Path, tmp_path: Path) -> None:
    flags = ["--answers", str(written), "--output", str(tmp_path / "drafter"), "--quiet"]
    shape = ["--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "2", "--steps", "2"]
    assert train_drafter.main([*model, *flags, *shape, "--held-out", "4"]) == 0
    assert (tmp_path / "drafter" / "model.safetensors").exists()


def test_only_what_may_have_written_them_learns_from_them(
    model_in: ModelIn, written: Path, tmp_path: Path, refused: Run
) -> None:
    """Another template, or other weights of the same shape, have not."""
    drafter, asked = tmp_path / "drafter", ["--answers", str(written), "--held-out", "4"]
    chat, tuned = tmp_path / "chat", tmp_path / "tuned"
    for folder in (chat, tuned):
        shutil.copytree(model_in("tiny", "bfloat16"), folder)
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "hi"}))
    weights: dict[str, Any] = mx.load(str(tuned / "model.safetensors"))  # pyright: ignore
    weights["model.norm.weight"] = 2 * weights["model.norm.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(tuned / "model.safetensors"), weights, {"format": "mlx"})
    for folder, sentence in ((chat, "its template hash is none"), (tuned, "its weights hash is")):
        flags = ["--model", folder, *asked, "--output", drafter]
        assert sentence in refused(train_drafter.main, *flags)
    assert sorted(tmp_path.iterdir()) == [chat, tuned]


def test_what_was_stopped_goes_on(
    model: list[str],
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Run,
) -> None:
    path, opened, parts = tmp_path / "answers.npz", Path.open, []

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "a" in mode:
            parts.append(path)
            if len(parts) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, mode, *args, **options)

    flags = [*model, *PROMPTS, *WRITING, "--write-answers", path]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert "No space left" in refused(train_drafter.main, *flags, alone=False)
    kept = tmp_path / "answers.npz.jsonl"
    assert len(responses.read_responses(kept)) == 32
    assert train_drafter.main([str(flag) for flag in flags]) == 0
    assert read_answers(path) == read_answers(written)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data {data} --output d --write-answers a.npz", "name either --output"),
        ("--data {data}", "name either --output"),
        ("--answers {answers} --write-answers a.npz", "--write-answers needs --data"),
        ("--data {data} --write-answers {answers}", "exists; name another"),
        ("--data {data} --write-answers nowhere/a.npz", "its folder does not exist"),
        ("--data {data} --write-answers a.npz --max-tokens 600", "600 tokens are too long"),
    ],
)
def test_bad_arguments(
    model: list[str],
    written: Path,
    tmp_path: Path,
    flags: str,
    sentence: str,
    refused: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = flags.format(data=benchmark.PROMPTS, answers=written).split()
    assert sentence in refused(train_drafter.main, *model, *given)
    assert list(tmp_path.iterdir()) == []
