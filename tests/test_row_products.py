"""Products of a few rows before OpenBLAS: right, the same bits beside any rows, and optional."""

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.blas import row_products
from mlx_distill.user_cache import cache_folder

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these products"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler"),
]
LIBRARY = "libopenblas.so.0"
ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE = 101, 111, 112
ROWS = 64


WITHOUT = ["-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else []


@pytest.fixture(scope="module", params=["as built", *WITHOUT])
def products(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The library, which the package has built for this machine, with OpenBLAS behind it.

    Built anew for processors of narrower registers, too.
    """
    try:
        blas = ctypes.CDLL(LIBRARY)
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    found = row_products._find(cache_folder("products"))
    assert found, "the package builds it when it is imported"
    made = tmp_path_factory.mktemp("products") / "products.so"
    if request.param == "as built":
        shutil.copy(found[1], made)  # apart from the one in use
    else:
        command = [*row_products.COMPILER, request.param, "-shared", "-fPIC"]
        subprocess.run([*command, row_products.SOURCE, "-o", made], check=True)
    library = ctypes.CDLL(made)
    address = ctypes.c_void_p
    gemm, threads = blas.cblas_sgemm, blas.openblas_get_num_threads
    library.mlx_distill_use(ctypes.cast(gemm, address), ctypes.cast(threads, address), ROWS)
    return library


def multiply(
    library: ctypes.CDLL,
    x: np.ndarray,
    w: np.ndarray,
    y: np.ndarray,
    transposed: bool = True,
    alpha: float = 1,
    beta: float = 0,
) -> None:
    """Multiply in place; rows may be further apart than they are long."""

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    library.cblas_sgemm(
        ROW_MAJOR,
        NO_TRANSPOSE,
        TRANSPOSE if transposed else NO_TRANSPOSE,
        *(x.shape[0], y.shape[1], x.shape[1]),
        ctypes.c_float(alpha),
        *(pointer(x), x.strides[0] // 4, pointer(w), w.strides[0] // 4),
        ctypes.c_float(beta),
        *(pointer(y), y.strides[0] // 4),
    )


def spread(random: np.random.Generator, rows: int, columns: int, gap: int) -> np.ndarray:
    whole = random.normal(size=(rows, columns + gap)).astype(np.float32)
    return whole[:, :columns]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 16, 33, 64, 65])
def test_a_product_is_that_of_float64(products: ctypes.CDLL, rows: int, transposed: bool) -> None:
    random = np.random.default_rng(rows)
    for columns, depth in [(1, 1), (3, 7), (64, 136), (70, 300), (256, 64), (700, 1031), (2, 600)]:
        for alpha, beta in [(1.0, 0.0), (0.5, 0.0), (2.0, 1.0), (1.0, -0.5)]:
            x = spread(random, rows, depth, 3)
            w = spread(random, *((columns, depth) if transposed else (depth, columns)), 5)
            y = spread(random, rows, columns, 2)
            before, kept = y.astype(np.float64), y.base[:, columns:].copy()  # pyright: ignore
            if beta == 0:
                y[:] = np.nan  # is not read
                before[:] = 0
            multiply(products, x, w, y, transposed, alpha, beta)
            exact = x.astype(np.float64) @ (w.T if transposed else w).astype(np.float64)
            np.testing.assert_allclose(
                y, alpha * exact + beta * before, rtol=1e-4, atol=2e-6 * depth**0.5 + 1e-6
            )
            np.testing.assert_array_equal(y.base[:, columns:], kept)  # pyright: ignore


@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_has_the_same_bits_beside_any_others(products: ctypes.CDLL, transposed: bool) -> None:
    random = np.random.default_rng(0)
    columns, depth = (1500, 600) if transposed else (130, 600)
    x = random.normal(size=(ROWS, depth)).astype(np.float32)
    w = random.normal(size=(columns, depth) if transposed else (depth, columns))
    w = w.astype(np.float32)
    whole = np.empty((ROWS, columns), np.float32)
    multiply(products, x, w, whole, transposed)
    for rows in range(1, 20):
        part = np.empty((rows, columns), np.float32)
        multiply(products, x[:rows], w, part, transposed)
        np.testing.assert_array_equal(part, whole[:rows])


def test_products_of_several_threads_at_once(products: ctypes.CDLL) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 512)).astype(np.float32)
    w = random.normal(size=(3000, 512)).astype(np.float32)
    wanted = np.empty((8, 3000), np.float32)
    multiply(products, x, w, wanted)
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(60):
            y = np.empty((8, 3000), np.float32)
            multiply(products, x, w, y)
            if not np.array_equal(y, wanted):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os
import mlx_distill
import mlx.core as mx
from mlx_distill.blas import openblas

assert openblas.most_rows()
mx.set_default_device(mx.cpu)
import ctypes, numpy as np
gemm = ctypes.CDLL(None).cblas_sgemm
x, w = np.ones((4, 512), np.float32), np.ones((2048, 512), np.float32)

def product():
    y = np.zeros((4, 2048), np.float32)
    of = lambda array: ctypes.c_void_p(array.ctypes.data)
    gemm(101, 111, 112, 4, 2048, 512, ctypes.c_float(1), of(x), 512, of(w), 512,
         ctypes.c_float(0), of(y), 2048)
    return float(y.min()), float(y.max())

assert product() == (512, 512)
child = os.fork()
if not child:
    os._exit(0 if product() == (512, 512) else 1)
print(os.waitpid(child, 0)[1], product())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_a_forked_process_multiplies_without_the_threads(products: ctypes.CDLL) -> None:
    assert run(FORKED).stdout == "0 (512.0, 512.0)\n"


USED = "import mlx_distill; from mlx_distill.blas import openblas; print(openblas.most_rows() > 0)"


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "mlx_distill" / "products").glob("*.so"))


def compiler(folder: Path, script: str) -> str:
    """Return a PATH on which g++ is this shell script."""
    folder.mkdir()
    program = folder / "g++"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_library_is_built_once_and_again_after_damage(
    products: ctypes.CDLL, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    done = run(USED, **environment)
    assert (done.stdout, done.stderr) == ("True\n", row_products.HINT + "\n")
    (file,) = kept(tmp_path)
    there = {**environment, "PATH": compiler(tmp_path / "none", "exit 9")}
    done = run(USED, **there)
    assert (done.stdout, done.stderr, kept(tmp_path)) == ("True\n", "", [file])

    file.write_bytes(file.read_bytes()[:-1000])
    assert run(USED, **environment).stdout == "True\n"
    (file,) = kept(tmp_path)
    assert row_products._digest(file) == file.stem.split("-")[2]


def test_processes_that_start_together_build_one_library(
    products: ctypes.CDLL, tmp_path: Path
) -> None:
    done: list[str] = []

    def start() -> None:
        done.append(run(USED, XDG_CACHE_HOME=str(tmp_path)).stderr)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["", "", row_products.HINT + "\n"]
    assert len(kept(tmp_path)) == 1


def test_what_cannot_be_compiled_is_not_tried_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    path = compiler(tmp_path / "broken", f"echo called >> {calls}; exit 1")
    for said in (row_products.HINT + "\n", ""):
        done = run(USED, XDG_CACHE_HOME=str(tmp_path), PATH=path)
        assert (done.stdout, done.stderr) == ("False\n", said)
    assert calls.read_text() == "called\n"


@pytest.mark.parametrize("why", ["switch", "no compiler", "no folder"])
def test_openblas_multiplies_alone(tmp_path: Path, why: str) -> None:
    (tmp_path / "file").write_text("")
    environments = {
        "switch": {row_products.SWITCH: "0"},
        "no compiler": {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        "no folder": {"XDG_CACHE_HOME": str(tmp_path / "file")},
    }
    done = run(USED, **environments[why])
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
