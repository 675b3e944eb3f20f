"""The command: measure, keep, report; what it refuses, it refuses before anything is loaded."""

import json
from pathlib import Path

import pytest

from mlx_distill import calibrate
from mlx_distill.speculation.costs import Costs

SIZES = {"rows": (1, 2, 4), "contexts": (16,), "widths": (1, 2), "lengths": (1, 2), "rounds": (3,)}
TINY = [word for name, values in SIZES.items() for word in (f"--{name}", *map(str, values))]


@pytest.mark.usefixtures("bundled_once")
def test_it_measures_reports_and_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output, picture = tmp_path / "result.json", tmp_path / "curve.png"
    assert calibrate.main([*TINY, "--output", str(output), "--plot", str(picture)]) == 0
    result = json.loads(output.read_text())
    costs = Costs.from_dict(result["costs"])
    assert costs.rows == (1, 2, 4)
    assert costs.contexts == (16,)
    assert {"machine", "versions", "commit", "config", "times"} <= result.keys()
    assert picture.stat().st_size > 1000
    said = capsys.readouterr()
    assert "16 tokens" in said.out
    kept = list((tmp_path / "cache" / "mlx_distill").rglob("*.json"))
    assert len(kept) == ("the machine is busy" not in said.err)
    assert all(f"Kept in {file}" in said.err for file in kept)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounds", "1"], "rounds must be at least 3, got 1"),
        (["--rows", "2"], "rows must hold 1, which is a plain step"),
        (["--plot", "curve.pdf"], "--plot writes a PNG"),
        (["--output", "/nowhere/result.json"], "its folder does not exist"),
        (["--output", "new.png", "--plot", "./new.png"], "--output and --plot name the same file"),
        (["--show", "--output", "new.json"], "--show measures nothing; leave --output"),
        (["--show", "--rows", "1", "2"], "--show measures nothing; leave --rows out"),
        (["--quick", "--rounds", "3"], "the first use of a pair does; leave --rounds out"),
        (["--contexts", "16", "--quick"], "the first use of a pair does; leave --contexts out"),
    ],
)
def test_refusals(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
