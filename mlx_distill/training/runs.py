"""A run's folder: refused if it exists, partial while it is made, and resumed only as it began."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.errors import InputError
from mlx_distill.files import is_taken, read_json, write_whole
from mlx_distill.locks import locked
from mlx_distill.training.checkpoints import checkpoints

SETTINGS, LOCK = "settings.json", "lock"


def partial_folder(output: Path) -> Path:
    """Return where a result is made, until it is whole."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, resume: bool) -> None:
    """Refuse to write over anything, before any work is done.

    Raises:
        InputError: If the output exists, or an unfinished run is in the way or missing.
    """
    if is_taken(output):  # first: the root and the folder that one is in have no name to add to
        raise InputError(f"the output {output} exists; name another, or remove it")
    work = partial_folder(output)
    if work.exists() and not resume:
        if (work / LOCK).exists():
            with locked(work / LOCK, work):  # what is being made is not to be removed
                pass
        raise InputError(f"{work} holds an unfinished training; add --resume, or remove it")
    if resume and not work.exists():
        raise InputError(f"there is nothing to resume: {work} does not exist")


def clear_away(work: Path) -> None:
    """Remove the folder of a finished run, which may be a link to where it was moved to."""
    if work.is_symlink():
        shutil.rmtree(work.resolve())
        work.unlink()
    else:
        shutil.rmtree(work)


def begin_or_resume(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a run is made with; refuse to go on with one that was made with anything else.

    Raises:
        InputError: If the folder holds checkpoints of a run with other settings, or of none known.
    """
    path = folder / SETTINGS
    if checkpoints(folder):
        if not path.exists():
            raise InputError(f"{folder} holds checkpoints and no {SETTINGS}; name another folder")
        check_settings(path, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def check_settings(path: Path, settings: Mapping[str, Any], unknown: Collection[str] = ()) -> None:
    """Raise InputError if the training to resume is not the one that is asked for.

    Args:
        path: What it was begun with.
        settings: What is asked for.
        unknown: Names of settings that are found out later; they are not compared.
    """
    begun = {name: value for name, value in read_json(path).items() if name not in unknown}
    changed = sorted(_differences(begun, json.loads(json.dumps(settings))))
    if changed:
        raise InputError(f"cannot resume with other settings: {'; '.join(changed)}")


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return what differs between two nested settings, a line per value."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [
            d for k in keys for d in _differences(old.get(k), new.get(k), f"{name}.{k}".strip("."))
        ]
    return [] if old == new else [f"{name} was {old!s:.80}, is {new!s:.80}"]
