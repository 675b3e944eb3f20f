"""The example that measures many texts at once runs as it says."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "batch_speed.py"


def test_both_arms_are_measured_against_mlx_lm(
    bundled_part: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(bundled_part), "--batch", "2", "--max-tokens", "6", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    arms = "mlx-lm", "mlx_distill, no drafts", "mlx_distill"
    for line, arm in zip(lines, arms, strict=True):
        assert line.split()[:2] == ["2", "texts"]
        assert line[11:33].rstrip() == arm
    assert lines[0].endswith("tokens/s  1.00 (1.00-1.00)")
