"""Put OpenBLAS in front of the reference BLAS that Linux builds of MLX carry.

The Linux CPU wheels of MLX bundle the reference BLAS, which multiplies float32 matrices at about
4 GFLOP/s. Symbols of a library that is loaded globally before ``mlx.core`` win over the bundled
ones, so loading OpenBLAS first is enough: 260 GFLOP/s on the same two cores. macOS has Accelerate
and is left alone. Products of a few rows, which all of decoding are, come before both:
``row_products``.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlx_distill.blas.row_products import load_row_products

HINT = (
    "mlx_distill: OpenBLAS was not found, so matrix products run up to 60 times slower; "
    "install it with: apt-get install libopenblas0-pthread"
)
ORDER_HINT = (
    "mlx_distill: mlx was imported first, so it keeps its slow BLAS; "
    "import mlx_distill before mlx (or set LD_PRELOAD=libopenblas.so.0)"
)


def load_openblas(library: str = "libopenblas.so.0") -> bool:
    """Load OpenBLAS globally on Linux and return whether matrix products will use it.

    Called once, when the package is imported. Where it cannot help it prints one line on stderr.
    """
    if sys.platform != "linux":
        return False
    global _openblas, _most_rows
    imported = "mlx.core" in sys.modules
    try:
        loaded = _is_loaded("libopenblas")
        _openblas = ctypes.CDLL(library)
        if not imported and not loaded:
            _most_rows = load_row_products(_openblas, library)
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print(HINT, file=sys.stderr)
        return False
    if imported and not loaded:
        print(ORDER_HINT, file=sys.stderr)
        return False
    return True


@contextmanager
def drafting_threads() -> Iterator[None]:
    """Use the threads of OpenBLAS that drafting is fastest with; restore them afterwards.

    A calibration has measured which those are (``prefer``). Without one, a few products decide.
    Drafting multiplies a few rows at a time and builds graphs from Python meanwhile. Where a
    further core makes such products much faster, OpenBLAS keeps all its threads; where it does
    not (two cores that are halves of one, for example), the thread that builds graphs gets one:
    either choice, made on the other's machine, cost a quarter of the speed. Where the caller has
    set OPENBLAS_NUM_THREADS, and without OpenBLAS, nothing changes.
    """
    global _users, _threads, _for_drafts, _used
    library = _openblas
    if library is None or is_set_by_user():
        yield
        return
    if _users == 0:
        _threads = library.openblas_get_num_threads()
        _for_drafts = _preferred or fastest_threads(library, _threads)
        library.openblas_set_num_threads(_for_drafts)
        _used = _for_drafts
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if _users == 0:  # generators that overlap may end in any order
            library.openblas_set_num_threads(_threads)


def let_draft(drafts: bool) -> None:
    """Choose, inside ``drafting_threads``, between the threads of drafting and all there are.

    A prompt and a plain step are fastest with all of them: a text that is parked would be up to a
    tenth slower than plain decoding with one thread of two.
    """
    global _used
    wanted = _for_drafts if drafts else _threads
    if _openblas is not None and _users and wanted != _used:
        _openblas.openblas_set_num_threads(wanted)
        _used = wanted


_users, _threads, _for_drafts, _used = 0, 0, 0, 0
_preferred: int | None = None


def most_rows() -> int:
    """Return up to how many rows of float32 are multiplied by our own products.

    There a row's product with a matrix has the same bits beside any others, if both lie row by row.
    0: OpenBLAS does all.
    """
    return _most_rows


def is_set_by_user() -> bool:
    """Return whether the user has set the number of threads, which is then left alone."""
    return "OPENBLAS_NUM_THREADS" in os.environ


def choices() -> tuple[int, ...]:
    """Return the numbers of threads that drafting may be fastest with; none without a choice."""
    if _openblas is None or is_set_by_user():
        return ()
    threads = _threads if _users else _openblas.openblas_get_num_threads()
    return (threads, threads - 1) if threads > 1 else ()


def prefer(threads: int | None) -> None:
    """Let drafts that begin from now on use so many threads; None lets a few products decide."""
    global _preferred
    _preferred = threads


@cache
def fastest_threads(library: ctypes.CDLL, threads: int) -> int:
    """Return ``threads``, or one less if the last one hardly helps products of eight rows."""
    if threads < 2:
        return threads
    import mlx.core as mx

    rows, weight = mx.ones((8, 1024)), mx.ones((1024, 1024)) / 1024
    mx.eval(rows, weight)
    seconds: dict[int, list[float]] = {threads: [], threads - 1: []}
    for _ in range(5):
        for number, times in seconds.items():
            library.openblas_set_num_threads(number)
            product = rows
            start = time.perf_counter()
            for _ in range(8):
                product = product @ weight.T
            mx.eval(product)
            times.append(time.perf_counter() - start)
    gain = min(seconds[threads - 1]) / min(seconds[threads])
    # Perfect scaling gains 1 / (threads - 1). Two whole cores reach half of it, and there all the
    # threads are faster; a quarter has to arrive, so that the measurement's noise does not decide.
    return threads if gain > 1 + 0.25 / (threads - 1) else threads - 1


_openblas: ctypes.CDLL | None = None
_most_rows = 0


def _is_loaded(name: str) -> bool:
    """Return whether this process has already mapped a library of that name."""
    with open("/proc/self/maps") as maps:
        return any(name in line for line in maps)
