"""Files and folders that one run at a time writes to."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_distill.errors import InputError

_training = threading.RLock()  # a training's own callback may train something else


class Busy(InputError):
    """Another run writes there; what lies there is that run's."""


@contextmanager
def only_training() -> Iterator[None]:
    """Keep this process's other threads from training meanwhile: MLX's random state is shared.

    Raises:
        Busy: If another thread trains.
    """
    if not _training.acquire(blocking=False):
        raise Busy(
            "another thread of this process is training; MLX's random state is shared, so neither "
            "could be repeated; wait for it, or start another process"
        )
    try:
        yield
    finally:
        _training.release()


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
        raise Busy(
            f"{name or path} is being written by another run; wait for it, or name another"
        ) from None
    finally:
        os.close(file)
