"""How the kernel shares the cores among the tests' threads, where it can be told (Linux)."""

import os
import sys


def wait_for_turns() -> None:
    """Let no thread interrupt the one that wakes it.

    MLX's CPU stream is a thread that is woken for every operation. Two processes of tests keep two
    cores busy, so that it would interrupt them twenty million times in a run of the suite.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
