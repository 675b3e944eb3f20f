"""How the kernel shares the cores among the tests' processes, where it can be told (Linux).

MLX's CPU stream is a thread that is woken for every operation. As a batch process it does not
interrupt the thread that wakes it, and on that thread's own core it finds its caches: a fifth of
the suite's time, and a tenth of its switches between threads.
"""

import os
import sys


def share_cores() -> None:
    """Make this process a batch process; keep a worker of several on a core of its own."""
    if sys.platform != "linux":
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
