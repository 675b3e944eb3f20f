"""Whether this process has the processor's cores to itself, asked of the cores.

    seconds on the clock / seconds on a core, of threads that only work   =  1 + crowding

Threads that wait for nothing are on a core all the time, unless other programs take it. A load
average tells of programs that have ended and, in a container, of other containers.
"""

import hashlib
import os
import threading
import time

# More cores than these are seldom wanted at once, and many threads wait for Python, too.
MOST_CORES = 4
# A look lasts so many seconds; a quarter of several decides, for what runs all the time is met by
# each, and what comes and goes by some.
LOOK_S, LOOKS = 0.005, 5
# Before each: threads of OpenBLAS, which are no others, turn in a circle for 30 ms after a product.
APART_S = 0.05
_WORK = bytes(1 << 17)  # is hashed in 0.1 ms, in which Python is left to the others


def crowding(looks: int = LOOKS) -> float:
    """Return how much longer than alone work on every core takes just now, as a share of it.

    0 is a quiet machine; 1 says that another program as greedy as this one has half of each core.
    """
    return sorted(_look() for _ in range(looks))[looks // 4]


def _look() -> float:
    time.sleep(APART_S)
    waited: list[float] = []

    def work() -> None:
        start, used = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < LOOK_S:
            hashlib.sha256(_WORK).digest()
        took_s, used_s = time.perf_counter() - start, time.thread_time() - used
        waited.append(max(0.0, took_s / used_s - 1) if used_s > 0 else 0.0)

    threads = [threading.Thread(target=work) for _ in range(min(MOST_CORES, os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(waited)
