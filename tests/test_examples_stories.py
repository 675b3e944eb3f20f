"""The examples on stories, with few texts and fewer steps."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STORY = "Once upon a time, a {} went to the park. It saw a red ball and was very happy. The end."
ANIMALS = ("dog", "cat", "bird", "frog", "cow", "horse", "mouse", "duck")


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"text": STORY.format(animal)}) + "\n" for animal in ANIMALS]
    (folder / "train-00.jsonl").write_text("".join(rows))
    (folder / "valid.jsonl").write_text("".join(rows[:2]))
    return folder


def test_every_recipe_of_the_study_runs_and_is_not_run_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = example("distill_stories", monkeypatch)
    runs, found = tmp_path / "runs", tmp_path / "found.json"
    options = ["--data", str(data), "--runs", str(runs), "--steps", "2", "--max-length", "16"]
    options += ["--valid-texts", "4"]
    recipes = ["--recipes", *stories.LOSSES, "--keep", "response-0", "--json", str(found)]
    assert stories.main([*options, *recipes]) == 0
    result = json.loads(found.read_text())
    assert [row["recipe"] for row in result["summary"]] == list(stories.LOSSES)
    rows = {row["recipe"]: row for row in result["summary"]}
    for baseline in ("plain", "layer"):
        gap = rows[baseline]["best_nats"]["mean"] - rows[baseline]["teacher_nats"]
        closed = rows[baseline]["best_nats"]["mean"] - rows["response"]["nats"]["mean"]
        row = rows["response"]
        assert row[f"gap_closed_{baseline}"]["mean"] == pytest.approx(closed / gap)
        kls = row["kl"]["mean"] / rows[baseline]["best_kl"]["mean"]
        assert row[f"kl_cut_{baseline}"]["mean"] == pytest.approx(1 - kls)
    sizes = result["runs"][0]
    assert 4 * sizes["parameters"] <= sizes["teacher_parameters"]
    assert (runs / "response-0" / "model.safetensors").exists()
    before = {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert stories.main([*options, *recipes]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert "gap closed" in capsys.readouterr().out


def test_stored_completions_are_filtered_and_learned(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = example("stored_completions", monkeypatch)
    found, log = tmp_path / "found.json", tmp_path / "log.jsonl"
    options = ["--data", str(data), "--log", str(log), "--work", str(tmp_path / "work")]
    assert stored.main([*options, "--steps", "2", "--json", str(found)]) == 0
    result = json.loads(found.read_text())
    assert result["texts"] < len(
        log.read_text().splitlines()
    )  # the double and the refusal, at least
    assert set(result["figures"]) == {"before", "after"}
    out = capsys.readouterr().out
    assert "refusal" in out
    assert "duplicate" in out
