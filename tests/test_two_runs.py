"""Two runs that write under one name: one of them says so, and nothing of the other is lost."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distilling import arguments, main

from mlx_distill import InputError
from mlx_distill.files import new_path, whole_folder, write_new
from mlx_distill.locks import Busy, locked
from mlx_distill.training.runs import check_output

pytestmark = pytest.mark.usefixtures("no_hub", "no_curves")


def test_a_folder_that_another_run_is_writing(tmp_path: Path) -> None:
    """The second one emptied the first one's folder, and they made one of both."""
    with whole_folder(tmp_path / "one") as first:
        (first / "weights").write_text("first")
        second = whole_folder(tmp_path / "one")
        with pytest.raises(Busy, match="one is being written by another run"):
            second.__enter__()
        assert (first / "weights").read_text() == "first"
    assert os.listdir(tmp_path) == ["one"]
    assert (tmp_path / "one" / "weights").read_text() == "first"


def test_what_a_kill_left_of_a_folder_goes(tmp_path: Path) -> None:
    old = tmp_path / "one.writing"
    (old / "inner").mkdir(parents=True)
    (old / "inner" / "file").write_text("old")
    (old / "link").symlink_to(tmp_path)
    with whole_folder(tmp_path / "one") as writing:
        assert not os.listdir(writing)
    assert os.listdir(tmp_path) == ["one"]


def test_a_folder_whose_name_is_taken_meanwhile(tmp_path: Path) -> None:
    def taken() -> None:
        with whole_folder(tmp_path / "one"):
            (tmp_path / "one").mkdir()
            (tmp_path / "one" / "kept").touch()

    with pytest.raises(InputError, match="could not be written"):
        taken()
    assert os.listdir(tmp_path) == ["one"]


def test_a_result_that_another_run_has_written_meanwhile_stays(tmp_path: Path) -> None:
    output = new_path(tmp_path / "result.json")
    output.write_text("another's")
    with pytest.raises(InputError, match=r"result\.json exists"):
        write_new(output, "mine")
    assert output.read_text() == "another's"


@pytest.mark.parametrize("check", [new_path, lambda path: check_output(path, False)])
def test_a_link_to_nothing_is_no_new_name(tmp_path: Path, check: Callable[[Path], Any]) -> None:
    """No folder can be renamed to it: a whole training was done before that was found out."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="link exists"):
        check(tmp_path / "link")


def test_a_name_too_long_to_be_written_under(tmp_path: Path) -> None:
    """It is written under a longer one first."""
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        new_path(tmp_path / ("n" * 250))


@pytest.mark.parametrize("error", [InputError("its data have changed"), KeyboardInterrupt()])
def test_what_another_run_has_begun_stays(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Before its first checkpoint, a second run that failed early removed it."""
    work = tmp_path / "student.partial"

    def fails(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("mlx_distill.distillation.run.distill", fails)
    with locked(work / "lock"):
        (work / "log.jsonl").write_text("{}")
        assert main([*arguments(world, tmp_path / "student"), "--resume"]) in (2, 130)
        assert (work / "log.jsonl").read_text() == "{}"
    assert main([*arguments(world, tmp_path / "student"), "--resume"]) in (2, 130)
    assert not work.exists()  # nobody writes there, and there is nothing to resume


def test_what_another_run_is_making_is_not_to_be_removed(tmp_path: Path) -> None:
    """Without --resume it was called unfinished, and its folder was to be removed."""
    work = tmp_path / "student.partial"
    with locked(work / "lock"), pytest.raises(Busy, match="is being written by another run"):
        check_output(tmp_path / "student", False)
    with pytest.raises(InputError, match="unfinished training; add --resume, or remove it"):
        check_output(tmp_path / "student", False)


def test_an_unfinished_run_may_be_moved(world: Path, tmp_path: Path) -> None:
    """Its student was written, and then the link in its place ended the command with an error."""
    moved, link = tmp_path / "disk" / "moved", tmp_path / "student.partial"
    moved.mkdir(parents=True)
    link.symlink_to(moved)
    assert main([*arguments(world, tmp_path / "student"), "--resume"]) == 0
    assert not moved.exists()
    assert not link.is_symlink()


def test_a_full_disk_says_of_what_file(tmp_path: Path) -> None:
    """The system's error names none, and "a file" was all that was said."""
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("of Linux")
    (tmp_path / "result.json.writing").symlink_to(path)
    with pytest.raises(OSError, match="No space left") as full:
        write_new(tmp_path / "result.json", "x")
    assert full.value.filename == str(tmp_path / "result.json")
    assert not os.listdir(tmp_path)
