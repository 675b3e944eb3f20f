"""The command ``benchmark``, from prompts to a file and a picture."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_distill import (
    DraftPlan,
    benchmark,
)
from mlx_distill.benchmarking import studies
from mlx_distill.benchmarking.arms import OURS, Bench
from mlx_distill.checkpoint import bundled

pytestmark = pytest.mark.usefixtures("no_hub", "bundled_once", "not_compiled")


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


TINY = ["--num-prompts", "2", "--max-tokens", "10", "--prompt-tokens", "6", "--timed-prompts", "2"]


def test_benchmark_writes_json_and_png(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "sweep.png"
    sweep = ["--sweep-prompts", "1", "--sweep-widths", "1", "2", "--sweep-lengths", "2", "3"]
    files = ["--data", str(prompts), "--output", str(output), "--plot", str(picture)]
    assert benchmark.main([*TINY, *sweep, *files]) == 0
    result = json.loads(output.read_text())
    names = {"arms", "equal_texts", "acceptance_by_depth", "overhead", "sweep", "config", "dtype"}
    assert names | {"commit", "machine", "versions"} <= set(result)
    assert [row["arm"] for row in result["arms"]] == ["mlx-lm", "mlx_distill"]
    assert result["equal_texts"] == 2
    for row in result["arms"]:
        assert row["prompts"] == 2
        assert row["tokens_per_s"]["quartile_1"] <= row["tokens_per_s"]["median"]
        assert row["tokens_per_s"]["median"] <= row["tokens_per_s"]["quartile_3"]
        assert row["peak_memory_bytes"] > 0
    assert result["arms"][0]["speedup"]["median"] == 1
    assert result["arms"][0]["tokens_per_call"] == pytest.approx(10 / 9)
    assert result["arms"][1]["tokens_per_call"] > 1
    shapes = [(row["beam_width"], row["draft_length"]) for row in result["sweep"]]
    assert shapes == [(1, 2), (1, 3), (2, 2), (2, 3)]
    width, height = png_size(picture)
    assert width > 400
    assert height > 300
    table = capsys.readouterr().out
    assert "Tokens equal mlx-lm's on 2 of 2 prompts" in table
    assert "A cycle takes" in table


def test_benchmark_sampling_sharing_and_draft_model(
    tmp_path: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "result.json"
    monkeypatch.setattr(studies, "SHARING_SHAPES", ((5, 4), (10, 4)))
    more = ["--sharing", "--temp", "1", "--tree", "beam", "--max-tokens", "6"]
    model = ["--draft-model", str(bundled("stories-4m")), "--num-draft-tokens", "2"]
    files = ["--data", str(prompts), "--output", str(output)]
    assert benchmark.main([*TINY, *more, *model, *files]) == 0
    result = json.loads(output.read_text())
    assert result["equal_texts"] is None
    names = "mlx-lm", "mlx-lm with draft model", "mlx_distill", "mlx_distill with draft model"
    assert [row["arm"] for row in result["arms"]] == list(names)
    assert [row["beam_tokens"] for row in result["sharing"]] == [20, 40]
    assert all(0 < row["saved_share"] < 1 for row in result["sharing"])
    assert "saved by shared prefixes" in capsys.readouterr().out


def test_long_run_reports_every_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def arms(self: Bench, plan: DraftPlan) -> dict[str, Any]:
        def decode(prompt: list[int], seed: int) -> Iterator[int]:
            seeds.append(seed)
            return iter(range(300))

        return {OURS: decode}

    monkeypatch.setattr(Bench, "arms", arms)
    bench = Bench.__new__(Bench)
    rows = studies.long_run(bench, [[1], [2]], DraftPlan(), 2500)
    assert [row["tokens"] for row in rows][:2] == [1000, 2000]
    assert all(row["resident_bytes"] > 1e6 for row in rows)
    assert len(seeds) == len(set(seeds)) == 9


@pytest.mark.parametrize(
    "flags", [["--nodes", "1"], ["--max-tokens", "1"], ["--long-run", "20"], ["--num-prompts", "1"]]
)
def test_benchmark_takes_the_smallest_settings(tmp_path: Path, flags: list[str]) -> None:
    """Or refuses them in a sentence; but it does not break."""
    output = tmp_path / "result.json"
    small = ["--num-prompts", "2", "--max-tokens", "3", "--timed-prompts", "1"]
    status = benchmark.main([*small, *flags, "--output", str(output)])
    assert status in (0, 2)
    assert output.exists() == (status == 0)


def test_benchmark_has_prompts_of_its_own() -> None:
    rows = [json.loads(line) for line in benchmark.PROMPTS.read_text().splitlines()]
    assert len(rows) == 48
    assert len({row["prompt"] for row in rows}) == 48
