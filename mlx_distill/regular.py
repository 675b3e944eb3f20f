"""Files that have an end: a pipe waits for somebody to write, and some devices never stop."""

from pathlib import Path


def check_regular(path: Path) -> None:
    """Raise OSError if something that is to be read is a pipe, a socket or a device.

    What is not there, and a folder, are left to whoever opens it: that fails at once.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is a pipe or a device, not a file")
