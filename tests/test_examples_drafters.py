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
