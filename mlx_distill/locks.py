"""Files and folders that one run at a time writes to."""

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import to_host
from mlx_distill.errors import InputError

_training = threading.RLock()  # a training's own callback may train something else


class Busy(InputError):
    """Another run writes there; what lies there is that run's."""


@contextmanager
def only_training() -> Iterator[None]:
    """Keep this process's other threads from training meanwhile: MLX's random state is shared.

    A training sets that by its seed; what it was before, it is again afterwards.

    Raises:
        Busy: If another thread trains.
    """
    if not _training.acquire(blocking=False):
        raise Busy(
            "another thread of this process is training; MLX's random state is shared, so neither "
            "could be repeated; wait for it, or start another process"
        )
    try:
        state: Any = mx.random.state
        high, low = to_host(state[0])
        try:
            yield
        finally:
            mx.random.seed(high << 32 | low)  # a key is a seed's halves
    finally:
        _training.release()


@contextmanager
def own_folder(folder: Path, name: Path) -> Iterator[None]:
    """Make an empty folder that no other run writes to meanwhile; what a kill left in it goes.

    The folder itself is locked, so that nothing is left of that when it is renamed or removed.

    Args:
        folder: Made, with those that it lies in.
        name: What it stands for, in the message.

    Raises:
        Busy: If another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(name) from None
        except OSError:
            pass  # some file systems lock no folders
        if not _is_open(folder, held):  # whoever held it has just given it its name
            raise _busy(name)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield
    finally:
        os.close(held)


def _is_open(folder: Path, held: int) -> bool:
    """Return whether a folder is still the one that was opened."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(held))
    except FileNotFoundError:
        return False


def _busy(name: Path) -> Busy:
    return Busy(f"{name} is being written by another run; wait for it, or name another")


@contextmanager
def locked(path: Path, name: Path | None = None) -> Iterator[None]:
    """Keep other runs away from a file meanwhile; a run that is killed lets go of it.

    Args:
        path: Locked; made, with its folder, if it is not there.
        name: What it stands for, in the message.

    Raises:
        InputError: If another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise _busy(name or path) from None
    finally:
        os.close(file)
