"""The example that measures many texts at once runs as it says."""

from pathlib import Path

import pytest
from half_models import REFERENCE
from test_examples_stories import example

OPTIONS = ["--batch", "2", "--max-tokens", "6", "--runs", "1"]


def test_both_arms_are_measured_against_mlx_lm(
    bundled_part: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = example("batch_speed", monkeypatch)
    pair = ["--model", str(bundled_part), "--drafter", str(REFERENCE)]
    assert speed.main([*pair, *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    arms = "mlx-lm", "mlx_distill, no drafts", "mlx_distill"
    for line, arm in zip(lines, arms, strict=True):
        assert line.split()[:2] == ["2", "texts"]
        assert line[11:33].rstrip() == arm
    assert lines[0].endswith("tokens/s  1.00 (1.00-1.00)")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--runs", "0"], "runs must be at least 1, got 0"),
        (["--max-tokens", "1"], "max_tokens must be at least 2"),
    ],
)
def test_what_it_cannot_measure_is_said_in_a_sentence(
    flags: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert example("batch_speed", monkeypatch).main([*OPTIONS, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
