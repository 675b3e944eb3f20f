"""Files and folders that one run at a time writes to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_distill.errors import InputError


class Busy(InputError):
    """Another run writes there; what lies there is that run's."""


@contextmanager
def locked(path: Path, name: Path | None = None) -> Iterator[None]:
    """Keep other runs away from a file meanwhile; a run that is killed lets go of it.

    Args:
        path: Locked; made if it is not there.
        name: What it stands for, in the message.

    Raises:
        InputError: If another run holds it.
    """
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
