"""Ctrl-C while a command is still being imported.

That takes seconds, in which nothing is written yet: one line and the status of an interrupt are all
that has to be left. What is imported must not decide about it: a traceback through it says nothing,
and a library that catches every error in its imports would let the command go on.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def begin() -> None:
    """Let Ctrl-C end the process in one line, if it is one of the commands that starts."""
    if _starts_a_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def end() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: from now on there is something to put in order."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the process as an interrupted command ends."""
    os.write(2, b"\nstopped\n")
    os._exit(130)


def _starts_a_command() -> bool:
    """Return whether the package is imported for ``python -m mlx_distill.X`` or the script."""
    if sys.argv[:1] != ["-m"]:
        return os.path.basename("".join(sys.argv[:1])).startswith("mlx-distill")
    return any(word.startswith("mlx_distill.") for word in sys.orig_argv)
