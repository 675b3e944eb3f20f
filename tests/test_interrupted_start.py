"""Ctrl-C while a command is being imported: one line, status 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mlx_distill import cli, interrupts

LIBRARY = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
"""


@pytest.mark.parametrize("start", [["-m", "mlx_distill.generate"], ["mlx-distill"]])
def test_a_command_that_is_being_imported_ends_in_one_line(
    tmp_path: Path, start: list[str]
) -> None:
    """Though a library that it imports catches everything."""
    (tmp_path / "transformers.py").write_text(LIBRARY)
    (tmp_path / "mlx-distill").write_text("from mlx_distill.cli import main\nmain(['generate'])\n")
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, *start, "--prompt", "x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_hear_interrupts,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore them


def test_a_command_that_runs_is_told_by_an_exception(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, interrupts.stop)
    try:
        assert cli.command(lambda argv: signal.raise_signal(signal.SIGINT) or 0)([]) == 130
        assert capsys.readouterr().err == "\nstopped\n"
    finally:
        signal.signal(signal.SIGINT, before)
