"""Products of a few rows in front of OpenBLAS: compiled here, used where they are faster.

A step of a language model multiplies one row with every weight, a call that verifies a draft a few.
OpenBLAS puts the weights into another order for that; ``row_products.cpp`` reads them once, where
they lie. On two cores of an AMD EPYC the products of a step of SmolLM2-135M take 22 instead of 44
milliseconds, those of a call of eight rows 27 instead of 80.

MLX's Linux builds compile with g++ while they run, and so does this, once on a machine: the library
is kept in the user's cache folder, with what a probe has found of it. Without g++, or where such a
library would be slower, OpenBLAS does everything. macOS has other means and is left alone.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

from mlx_distill.user_cache import cache_folder

HINT = "mlx_distill: compiling products of a few rows for this machine, once"
SWITCH = "MLX_DISTILL_ROW_PRODUCTS"  # 0: OpenBLAS alone, to compare
SOURCE = Path(__file__).with_name("row_products.cpp")
PROBE = Path(__file__).with_name("row_products_probe.cpp")
COMPILER = ("g++", "-std=c++17", "-O3", "-march=native", "-fvisibility=hidden", "-pthread")
LONGEST_BUILD_S = 120


def load_row_products(blas: ctypes.CDLL, library: str) -> int:
    """Put the products in front of a BLAS, and return up to how many rows they are used; 0 is none.

    Symbols of what is loaded globally first win, so it comes before the BLAS is.

    Args:
        blas: OpenBLAS, not loaded globally yet.
        library: Its name.
    """
    if os.environ.get(SWITCH) == "0":
        return 0
    address = ctypes.c_void_p
    try:
        folder = cache_folder("products")
        rows, file = _find(folder) or _build(folder, library) or (0, None)
        if not rows:
            return 0
        products = ctypes.CDLL(str(file))
        gemm, threads = blas.cblas_sgemm, blas.openblas_get_num_threads
        products.mlx_distill_use(ctypes.cast(gemm, address), ctypes.cast(threads, address), rows)
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # what it calls is known by now
        first = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, address).value
        won = first == ctypes.cast(products.cblas_sgemm, address).value
    except (OSError, RuntimeError, AttributeError, ValueError):
        return 0  # no folder, no home, a library that cannot be loaded or is another one
    return rows if won else 0


def _key() -> str:
    """Return what tells a library from those of other sources, options and processors."""
    with open("/proc/cpuinfo") as file:
        known = [line for line in file if line.startswith(("model name", "flags", "Features"))]
    parts = [*COMPILER, platform.machine(), *sorted(set(known))]
    content = "\n".join(parts).encode() + SOURCE.read_bytes() + PROBE.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _find(folder: Path) -> tuple[int, Path] | None:
    """Return a library that is kept, and for how many rows; one that was damaged is none."""
    for file in sorted(folder.glob(f"{_key()}-*.so")):
        _, rows, digest = file.stem.split("-")
        if _digest(file) == digest:
            return int(rows), file
    return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _build(folder: Path, library: str) -> tuple[int, Path] | None:
    """Compile a library, find out what it is good for, and keep it.

    What cannot be compiled, or is wrong, is kept as an empty one for 0 rows: it is not tried again.
    """
    import fcntl
    import subprocess
    import tempfile

    if shutil.which(COMPILER[0]) is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _find(folder):  # another process has built it meanwhile
            return found
        print(HINT, file=sys.stderr)
        for left in folder.glob("building-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as place:
            made, probe = Path(place, "products.so"), Path(place, "probe")

            def run(*command: str | Path) -> bytes:
                return subprocess.run(
                    command, check=True, capture_output=True, timeout=LONGEST_BUILD_S
                ).stdout

            try:
                run(*COMPILER, "-shared", "-fPIC", SOURCE, "-o", made)
                run(*COMPILER, PROBE, "-o", probe, "-ldl")
                rows = int(run(probe, made, library))
            except (OSError, subprocess.SubprocessError):
                rows = 0
                made.write_bytes(b"")
            for damaged in folder.glob(f"{_key()}-*.so"):
                damaged.unlink(missing_ok=True)
            kept = folder / f"{_key()}-{rows}-{_digest(made)}.so"
            made.replace(kept)
            return rows, kept
