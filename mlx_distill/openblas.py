"""Put OpenBLAS in front of the reference BLAS that Linux builds of MLX carry.

The Linux CPU wheels of MLX bundle the reference BLAS, which multiplies float32 matrices at about
4 GFLOP/s. Symbols of a library that is loaded globally before ``mlx.core`` win over the bundled
ones, so loading OpenBLAS first is enough: 260 GFLOP/s on the same two cores. macOS has Accelerate
and is left alone.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
    global _openblas
    imported = "mlx.core" in sys.modules
    try:
        loaded = _is_loaded("libopenblas")
        _openblas = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print(HINT, file=sys.stderr)
        return False
    if imported and not loaded:
        print(ORDER_HINT, file=sys.stderr)
        return False
    return True


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leave a core to the thread that builds graphs, where OpenBLAS would take all of them.

    Drafting launches many small products from Python. On two cores a cycle took 9.6 instead of
    10.9 ms with one thread of OpenBLAS, a plain step 5.3 instead of 5.1. Elsewhere, and where the
    caller has set OPENBLAS_NUM_THREADS, nothing changes.
    """
    library = _openblas
    if library is None or "OPENBLAS_NUM_THREADS" in os.environ:
        yield
        return
    threads = library.openblas_get_num_threads()
    library.openblas_set_num_threads(max(1, min(threads, (os.cpu_count() or 1) - 1)))
    try:
        yield
    finally:
        library.openblas_set_num_threads(threads)


_openblas: ctypes.CDLL | None = None


def _is_loaded(name: str) -> bool:
    """Return whether this process has already mapped a library of that name."""
    with open("/proc/self/maps") as maps:
        return any(name in line for line in maps)
