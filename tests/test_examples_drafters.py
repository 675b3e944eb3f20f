"""The comparison of drafters, with few prompts."""

import json
from pathlib import Path

import pytest
from test_examples_stories import example


def test_all_ways_to_draft_are_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drafters = example("compare_drafters", monkeypatch)
    prompts = [{"prompt": "Once upon a time", "category": kind} for kind in ("a", "[/b]")]
    data, output = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = ["--data", str(data), "--num-prompts", "2", "--max-tokens", "6"]
    assert drafters.main([*options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    names = [row["drafter"] for row in found["rows"]]
    small = "stories-14m-redrafter"
    assert names == ["ngram", small, f"ngram+{small}", "draft model stories-4m"]
    for row in found["rows"]:
        assert list(row["classes"]) == ["all", "a", "[/b]"]
        assert row["equal_texts"] == 2
        for one in row["classes"].values():
            assert one["tokens_per_call"] >= 1
            assert one["speedup"] > 0
    out = capsys.readouterr().out
    assert names[0] in out
    assert "[/b]" in out  # a name, and no markup


@pytest.mark.parametrize("kinds", [("all", "a"), (None, "a")])
def test_all_are_all_classes_whatever_a_class_is_called(
    kinds: tuple[str | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a class count among all, and among nothing else."""
    drafters = example("compare_drafters", monkeypatch)
    prompts = [{"prompt": "Once upon a time", "category": kind} for kind in kinds]
    data, output = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = ["--num-prompts", "2", "--max-tokens", "6", "--drafters", "ngram"]
    assert drafters.main(["--data", str(data), *options, "--output", str(output)]) == 0
    for row in json.loads(output.read_text())["rows"]:
        classes = row["classes"]
        assert list(classes) == ["all", *(["all (class)"] if kinds[0] else []), "a"]
        assert classes["all"]["calls"] == 2 * classes["a"]["calls"]
        assert len(classes["all"]["speedups"]) == 2 * len(classes["a"]["speedups"]) == 2


def test_without_speed_no_text_is_equal_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written then but mlx-lm's own answers, and 0 equal texts would be a fault."""
    drafters = example("compare_drafters", monkeypatch)
    output, models = tmp_path / "found.json", []
    for number in (1, 2):
        models.append(tmp_path / str(number) / "small")
        models[-1].parent.mkdir()
        models[-1].symlink_to(drafters.bundled("stories-4m"))
    options = ["--num-prompts", "1", "--max-tokens", "4", "--no-speed", "--drafters", "ngram"]
    options += ["--draft-models", *map(str, models), "--output", str(output)]
    assert drafters.main(options) == 0
    found = json.loads(output.read_text())
    assert [row["equal_texts"] for row in found["rows"]] == [None, None, None]
    names = [row["drafter"] for row in found["rows"]]
    assert names == ["ngram", "draft model small", "draft model small (2)"]
    assert "draft_model" not in found["config"]
