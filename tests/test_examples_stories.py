"""The examples on stories, with few texts and fewer steps."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ModelIn

import mlx_distill
from mlx_distill.arrays import num_values
from mlx_distill.checkpoint import bundled
from mlx_distill.distillation.students import from_layers, read_config

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


def of_a_tiny_teacher(name: str, model_in: ModelIn, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return an example whose teacher is not the bundled one, but has its tokenizer."""
    module = example(name, monkeypatch)
    assert module.bundled is bundled
    monkeypatch.setattr(module, "bundled", lambda _: model_in("tiny", "float16"))
    return module


def test_the_study_s_student_is_a_quarter_of_the_bundled_teacher() -> None:
    path = bundled("stories-14m")
    teacher, _ = mlx_distill.load(path)
    student, _ = from_layers(teacher, read_config(path), [0])
    assert 4 * num_values(student.parameters()) <= num_values(teacher.parameters())


def test_every_recipe_of_the_study_runs_and_is_not_run_twice(
    data: Path,
    tmp_path: Path,
    model_in: ModelIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stories = of_a_tiny_teacher("distill_stories", model_in, monkeypatch)
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
    sizes = {name: result["runs"][0][name] for name in ("parameters", "teacher_parameters")}
    teacher, _ = mlx_distill.load(model_in("tiny", "float16"))
    whole, layer = (num_values(one.parameters()) for one in (teacher, teacher.model.layers[0]))
    assert sizes == {"parameters": whole - layer, "teacher_parameters": whole}
    assert (runs / "response-0" / "model.safetensors").exists()
    before = {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert stories.main([*options, *recipes]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert "gap closed" in capsys.readouterr().out


@pytest.fixture
def stories(model_in: ModelIn, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return of_a_tiny_teacher("distill_stories", model_in, monkeypatch)


def test_the_study_s_table_has_every_seed(stories: ModuleType, data: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--json", str(found)]
    options += ["--recipes", "plain", "--steps", "1", "--max-length", "16", "--valid-texts", "2"]
    assert stories.main([*options, "--seeds", "2", "10", "2"]) == 0
    result = json.loads(found.read_text())
    assert [run["seed"] for run in result["runs"]] == [2, 10]
    assert [row["seeds"] for row in result["summary"]] == [2]


def test_the_study_s_intervals_are_of_student_s_law(stories: ModuleType) -> None:
    for freedom, known in ((1, 12.706), (5, 2.571), (7, 2.365), (9, 2.262), (29, 2.045)):
        assert stories.t_quantile(freedom) == pytest.approx(known, abs=0.004)


def test_the_study_tunes_by_texts_that_nothing_learns(stories: ModuleType, data: Path) -> None:
    flags = ["--data", str(data), "--tune", "--valid-texts", "3"]
    _, tokenizer = mlx_distill.load(bundled("stories-14m"))
    learned, judged = stories._texts(stories._parser().parse_args(flags), tokenizer)
    assert (len(learned), len(judged)) == (len(ANIMALS) - 3, 3)
    assert not {tuple(one.tokens) for one in learned} & {tuple(one.tokens) for one in judged}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "3"], "holds plain-0 with another steps; name another --runs"),
        (["--texts", "3", "--seeds", "1"], "holds plain-0 with another texts"),
        (["--rate", "0.5"], "holds plain-0 with another rate"),
        (["--keep", "plain-0"], "plain-0 was trained without --keep; remove"),
        (["--keep", "layer-0"], "--keep takes one of the runs that are asked for, got layer-0"),
        (["--seeds", "1", "--rate", "0"], "learning_rate must"),
        (["--valid-texts", "0"], "valid_texts must be at least 1, got 0"),
        (["--data", "/nowhere"], "/nowhere holds no train*.jsonl"),
        (["--json", "/nowhere/found.json"], "its folder does not exist"),
        (["--runs", "new", "--tune", "--valid-texts", "99"], "there are no more"),
    ],
)
def test_the_study_s_refusals(
    stories: ModuleType,
    flags: list[str],
    sentence: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(data), "--runs", "runs", "--recipes", "plain", "--steps", "1"]
    options += ["--max-length", "16", "--valid-texts", "2"]
    assert stories.main(options) == 0
    assert stories.main([*options, *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_stored_completions_are_filtered_and_learned(
    data: Path,
    tmp_path: Path,
    model_in: ModelIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = of_a_tiny_teacher("stored_completions", model_in, monkeypatch)
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


def test_of_one_held_out_text_there_is_no_interval(
    data: Path,
    tmp_path: Path,
    model_in: ModelIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = of_a_tiny_teacher("stored_completions", model_in, monkeypatch)
    options = ["--data", str(data), "--log", str(tmp_path / "log"), "--work", str(tmp_path / "w")]
    assert stored.main([*options, "--steps", "1", "--valid-texts", "1"]) == 0
    assert ", 1 texts held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data", "/nowhere"], "/nowhere holds no train*.jsonl"),
        (["--texts", "0"], "texts must be at least 1, got 0"),
        (["--log", "/nowhere/log"], "/nowhere/log cannot be written"),
        (["--json", "/nowhere/found.json"], "/nowhere/found.json cannot be written"),
    ],
)
def test_stored_completions_refusals(
    flags: list[str],
    sentence: str,
    data: Path,
    tmp_path: Path,
    model_in: ModelIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = of_a_tiny_teacher("stored_completions", model_in, monkeypatch)
    options = ["--data", str(data), "--log", str(tmp_path / "log"), "--work", str(tmp_path / "w")]
    assert stored.main([*options, *flags]) == 2
    assert sentence in capsys.readouterr().err
