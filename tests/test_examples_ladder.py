"""The ladder of drafters, with few answers and fewer steps."""

import json
from pathlib import Path

import pytest
from test_examples_stories import example

PROMPTS = ("Once upon a time", "One day", "Tom and Lily", "The dog", "A girl", "It was late")
FLAGS = "--steps 2 --starts 16 --answer-tokens 12 --held-out 1 --judge-texts 2 --quiet"


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    return str(path)


def test_rungs_are_trained_once_and_stand_in_one_table(
    data: str,
    bundled_part: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ladder = example("drafter_ladder", monkeypatch)
    monkeypatch.setattr(ladder, "bundled", lambda name: bundled_part)
    output = tmp_path / "ladder"
    flags = ["--data", data, "--judge", data, "--output", str(output), *FLAGS.split()]
    with monkeypatch.context() as patch:
        patch.setattr(ladder, "draw", lambda rungs, path: None)  # it takes as long as all else
        assert ladder.main([*flags, "--rungs", "R0", "R2"]) == 0
    first = (output / "R0" / "model.safetensors").stat().st_mtime_ns
    assert ladder.main([*flags, "--rungs", "R0", "R2", "R2-4"]) == 0
    assert (output / "R0" / "model.safetensors").stat().st_mtime_ns == first
    rungs = json.loads((output / "ladder.json").read_text())["rungs"]
    assert [rung["rung"] for rung in rungs] == ["R0", "R2", "R2-4"]
    assert rungs[2]["file_bytes"] < 0.4 * rungs[1]["file_bytes"]
    assert rungs[0]["size"]["parameters"] < rungs[1]["size"]["parameters"]
    table = (output / "ladder.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert [line.split(" ")[1] for line in table.splitlines()[2:]] == ["R0", "R2", "R2-4"]
    assert (output / "ladder.png").stat().st_size > 10_000
    monkeypatch.setattr(ladder, "train_drafter", pytest.fail)
    assert ladder.main([*flags, "--rungs", "R0", "--steps", "3"]) == 2
    assert "cannot resume with other settings: steps was 2, is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--judge-texts 0", "judge_texts must be at least 1, got 0"),
        ("--max-prompts -1", "max_prompts must be at least 1, got -1"),
    ],
)
def test_counts_are_checked_before_anything_is_trained(
    flags: str,
    sentence: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One was found out after the first training, the other left out the last prompt."""
    ladder = example("drafter_ladder", monkeypatch)
    given = ["--data", data, "--judge", data, "--output", str(tmp_path / "ladder")]
    assert ladder.main([*given, *FLAGS.split(), *flags.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "ladder").exists()
