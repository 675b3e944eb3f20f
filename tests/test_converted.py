"""A drafter is converted and judged before and after, by answers of its target."""

import json
from pathlib import Path

import numpy as np
import pytest
from half_models import REFERENCE

import mlx_distill
from mlx_distill import convert
from mlx_distill.checkpoint import bundled

DRAFTER = str(REFERENCE)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    prompt = tokenizer.encode("Once upon a time")
    found = mlx_distill.stream_generate(model, tokenizer, prompt, max_tokens=40)
    answer = [one.token for one in found]
    path = tmp_path_factory.mktemp("answers") / "answers.npz"
    lengths = {"prompt_len": np.array([len(prompt)]), "answer_len": np.array([len(answer)])}
    tokens = {"prompt": np.array(prompt), "answer": np.array(answer)}
    np.savez(path, greedy=np.array([True]), **lengths, **tokens)
    return str(path)


def flags(output: Path, answers: str | Path, *more: str) -> list[str]:
    return ["--drafter", DRAFTER, "--output", str(output), "--answers", str(answers), *more]


@pytest.mark.parametrize(
    ("asked", "forms"),
    [
        (["--bits", "4"], ["4 bits"]),
        (["--head-rank", "160"], ["a head of rank 160"]),
        (["--head-rank", "160", "--bits", "8"], ["a head of rank 160", "8 bits"]),
    ],
)
def test_a_drafter_is_judged_before_and_after(
    tmp_path: Path,
    answers: str,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    forms: list[str],
) -> None:
    output = tmp_path / "smaller"
    assert convert.main(flags(output, answers, *asked, "--json")) == 0
    *lines, said, last = capsys.readouterr().out.splitlines()
    assert said == f"the drafter is in {output}"
    assert [line.split(": ")[0] for line in lines] == ["as it was", *forms]
    worth = [float(line.split(" MB, ")[1].split()[0]) for line in lines]
    assert min(worth) > worth[0] - 0.5 > 1
    assert json.loads(last)["config"]["answers"] == "answers.npz"  # and not whose folder
    found = json.loads(last)["drafters"]
    assert [one["form"] for one in found] == ["as it was", *forms]
    assert [one["tokens_per_call"] for one in found] == pytest.approx(worth, abs=1e-3)
    sizes = [one["num_bytes"] for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == (output / "model.safetensors").stat().st_size
    mlx_distill.load_drafter(output, mlx_distill.load(bundled("stories-14m"))[0])


@pytest.mark.parametrize("form", ["ours", "published"])
def test_another_layout_judges_nothing(
    form: str, tmp_path: Path, answers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(flags(tmp_path / "other", answers, "--to", form)) == 2
    assert f"--to {form} judges nothing; leave --answers out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_judged_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "smaller"
    assert convert.main(flags(output, tmp_path / "none.npz", "--bits", "4")) == 2
    assert "cannot be read as answers: there is no such file" in capsys.readouterr().err
    assert not output.exists()
