"""Checkpoints of a training: complete under their names or not there at all.

A checkpoint is a folder ``step-0000100`` with two safetensors files: what the training changes, in
float32, and the optimizer's state.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.errors import InputError
from mlx_distill.files import check_safetensors
from mlx_distill.safetensors import read_arrays

NETWORK, OPTIMIZER = "network.safetensors", "optimizer.safetensors"


def save(folder: Path, step: int, weights: dict[str, mx.array], state: Any) -> None:
    """Write a checkpoint; keep the one before too.

    Args:
        folder: Where the checkpoints lie.
        step: Updates so far.
        weights: What the training changes, by name.
        state: A tree of arrays: the optimizer's.

    Raises:
        InputError: If it cannot be written; earlier checkpoints are untouched.
    """
    try:
        write(checkpoint_of(folder, step), {NETWORK: weights, OPTIMIZER: state})
    except InputError as error:
        raise InputError(
            f"the checkpoint of step {step} could not be written ({error}); {last_good(folder)}"
        ) from None
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def write(final: Path, files: dict[str, Any]) -> None:
    """Write a folder of safetensors files, each of a tree of arrays: whole or not at all.

    Raises:
        InputError: If that fails; what was there is untouched.
    """
    writing = final.with_name("writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        for name, tree in files.items():
            _save_arrays(writing / name, tree)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(writing, final)
    except (OSError, RuntimeError, InputError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise InputError(str(error)) from None


def restore(folder: Path) -> tuple[int, dict[str, mx.array], Any]:
    """Return the last checkpoint's step, weights and state; 0 and nothing if there is none.

    That newer ones are damaged is said on stderr.
    """
    found = checkpoints(folder)
    last = found[-1].name if found else ""
    for name in sorted(path.name for path in folder.glob("step-*") if path.name > last):
        print(f"{name} is damaged; going on from {last or 'the beginning'}", file=sys.stderr)
    if not found:
        return 0, {}, {}
    state = list(read_arrays(found[-1] / OPTIMIZER).items())
    return step_of(found[-1]), read_arrays(found[-1] / NETWORK), tree_unflatten(state)


def check_arrays(path: Path, found: Any, wanted: Any, remedy: str) -> None:
    """Raise InputError if a file lacks an array of a tree, or has another shape of it.

    Args:
        path: The file.
        found: What it holds.
        wanted: What it has to hold; it may hold more.
        remedy: The end of the sentence.
    """
    arrays: dict[str, Any] = dict(tree_flatten(found))
    expected: dict[str, Any] = dict(tree_flatten(wanted))
    for name, array in expected.items():
        if name not in arrays:
            raise InputError(f"{path} is damaged: it lacks {name}; {remedy}")
        shape = arrays[name].shape
        if shape != array.shape:
            why = f"{name} is of shape {shape}, not {array.shape}"
            raise InputError(f"{path} is damaged: {why}; {remedy}")


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first.

    What a power cut damaged is passed over: the one before it serves.
    """
    return sorted(path for path in folder.glob("step-*") if _is_whole(path))


def step_of(checkpoint: Path) -> int:
    """Return the number of updates that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step-{step:07d}"


def last_good(folder: Path) -> str:
    """Return where an interrupted training can go on, in words."""
    kept = checkpoints(folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint before it"


def _is_whole(checkpoint: Path) -> bool:
    try:
        for name in (NETWORK, OPTIMIZER):
            check_safetensors(checkpoint / name)
    except InputError:
        return False
    return True


def _save_arrays(path: Path, tree: Any) -> None:
    """Write the arrays of a tree and check that all of them arrived.

    A full disk can cut files short without a word from the writer.
    """
    arrays: dict[str, Any] = dict(tree_flatten(tree))  # of a flat one, itself
    mx.save_safetensors(str(path), arrays)
    check_safetensors(path)
