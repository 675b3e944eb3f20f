"""OpenBLAS in front of the reference BLAS, in processes of their own: what is loaded stays."""

import ctypes
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from half_models import REFERENCE

import mlx_distill
from mlx_distill.blas import openblas
from mlx_distill.blas.row_products import SWITCH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux loads OpenBLAS")


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


needs_openblas = pytest.mark.skipif(not has_openblas(), reason="OpenBLAS is not installed")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")} | environment,
    )


PACKAGE = """
from mlx_distill.blas import openblas
"""
MAPPED = """
def mapped():
    with open("/proc/self/maps") as maps:
        return any("libopenblas" in line for line in maps)
"""


@needs_openblas
@pytest.mark.parametrize("products", [False, True])
def test_importing_the_package_puts_openblas_first(products: bool) -> None:
    """A symbol is looked up in the order of loading; before OpenBLAS are our own products."""
    done = run(
        MAPPED
        + """
import ctypes
assert not mapped()
import mlx_distill
assert mapped()
import mlx.core as mx

class Place(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p),
                ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]

everything = ctypes.CDLL(None)
for symbol in ("cblas_sgemm", "sgemm_", "openblas_get_num_threads"):
    place = Place()
    address = ctypes.cast(getattr(everything, symbol), ctypes.c_void_p)
    assert everything.dladdr(address, ctypes.byref(place))
    print(place.file.decode())
assert mx.array_equal(mx.full((8, 8), 2.0) @ mx.eye(8), mx.full((8, 8), 2.0))
""",
        **{SWITCH: str(int(products))},
    )
    assert done.stderr == ""
    files = done.stdout.split()
    assert len(files) == 3
    first = "products" if products and openblas.most_rows() else "openblas"
    assert first in files[0]
    assert all("openblas" in file for file in files[1:]), files


MISSING = """
import ctypes

class Missing(ctypes.CDLL):
    def __init__(self, name, *args, **options):
        if name and "openblas" in str(name):
            raise OSError(f"{name}: cannot open shared object file")
        super().__init__(name, *args, **options)

ctypes.CDLL = Missing
"""


def test_missing_library_is_said_once() -> None:
    code = """
import mlx_distill
import mlx_distill.generate
from mlx_distill.blas.openblas import drafting_threads
with drafting_threads():
    print("still works")
import mlx.core as mx
print(mx.eye(3).sum().item())
"""
    done = run(MISSING + code)
    assert done.stderr == openblas.HINT + "\n"
    assert "apt-get install libopenblas0-pthread" in done.stderr
    assert done.stdout == "still works\n3.0\n"


def test_load_openblas_returns_whether_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert not openblas.load_openblas("libno-such-blas.so.9")
    assert capsys.readouterr().err == openblas.HINT + "\n"


@needs_openblas
def test_mlx_imported_first_is_said() -> None:
    done = run("import mlx.core" + PACKAGE)
    assert done.stderr == openblas.ORDER_HINT + "\n"


@needs_openblas
def test_preloaded_library_makes_any_order_right() -> None:
    done = run("import mlx.core" + PACKAGE, LD_PRELOAD="libopenblas.so.0")
    assert done.stderr == ""


def test_other_systems_are_left_alone() -> None:
    """The module alone: the libraries behind the package ask for the system too."""
    done = run(
        MAPPED
        + f"""
import runpy, sys
sys.platform = "darwin"
module = runpy.run_path({openblas.__file__!r})
assert module["load_openblas"]() is False
with module["drafting_threads"]():
    print(mapped())
"""
    )
    assert done.stdout == "False\n"
    assert done.stderr == ""


THREADS = (
    PACKAGE
    + """
import ctypes
library = ctypes.CDLL("libopenblas.so.0")
drafting_threads = openblas.drafting_threads
openblas.fastest_threads = lambda library, threads: max(1, threads - 1)
before = library.openblas_get_num_threads()
seen = [before]
with drafting_threads():
    seen.append(library.openblas_get_num_threads())
    with drafting_threads():
        seen.append(library.openblas_get_num_threads())
    seen.append(library.openblas_get_num_threads())
seen.append(library.openblas_get_num_threads())
try:
    with drafting_threads():
        raise KeyError
except KeyError:
    seen.append(library.openblas_get_num_threads())
print(*seen)
"""
)


@needs_openblas
def test_drafting_threads_restores_the_number_of_threads() -> None:
    done = run(THREADS)
    before, inside, nested, outside, after, raised = map(int, done.stdout.split())
    assert inside == nested == outside == max(1, before - 1)
    assert before == after == raised


@needs_openblas
def test_only_what_is_drafted_has_fewer_threads() -> None:
    """A prompt and a parked step are read as plain decoding reads them."""
    code = """
import ctypes, sys
sys.path.append("tests")
from drafting import PROMPTS, random_drafter
from mlx_distill import DraftPlan, stream_generate
from mlx_distill.checkpoint import bundled, load
from mlx_distill.target.target import Target
library = ctypes.CDLL("libopenblas.so.0")
library.openblas_set_num_threads(3)
openblas.prefer(2)
openblas.let_draft(True)  # nothing drafts yet
model, tokenizer = load(bundled("stories-4m"))
target, drafter, seen, plans = Target.of(model), random_drafter(model, 60), [], []
observe, verify = target.observe, target.verify

def noting(name, call):
    def called(tokens, *others):
        size = getattr(tokens, "tokens", tokens).size
        seen.append((name, size > 1, library.openblas_get_num_threads()))
        return call(tokens, *others)
    return called

class EverySecond:
    def shape(self, text, outcome):
        plans.append(None if len(plans) % 2 else DraftPlan(1, 1, 2))
        return plans[-1]

target.observe, target.verify = noting("read", observe), noting("verify", verify)
options = {"drafter": drafter, "plan": EverySecond(), "max_tokens": 12}
texts = [token.text for token in stream_generate(model, tokenizer, PROMPTS[0], **options)]
print(sorted(set(seen)), library.openblas_get_num_threads())
"""
    found = [("read", False, 3), ("read", True, 3), ("verify", False, 3), ("verify", True, 2)]
    assert run(PACKAGE + code).stdout == f"{found} 3\n"


@needs_openblas
def test_contexts_that_overlap_restore_the_number_of_threads() -> None:
    """Generators can end in any order."""
    code = """
import ctypes
library = ctypes.CDLL("libopenblas.so.0")
openblas.fastest_threads = lambda library, threads: threads + 1
first, second = openblas.drafting_threads(), openblas.drafting_threads()
seen = [library.openblas_get_num_threads()]
for step in (first.__enter__, second.__enter__):
    step()
    seen.append(library.openblas_get_num_threads())
for context in (first, second):
    context.__exit__(None, None, None)
    seen.append(library.openblas_get_num_threads())
print(*seen)
"""
    done = run(PACKAGE + code)
    before, *seen = map(int, done.stdout.split())
    assert seen == [before + 1, before + 1, before + 1, before]


@needs_openblas
def test_a_calibration_decides_on_the_threads() -> None:
    code = """
import ctypes
library = ctypes.CDLL("libopenblas.so.0")
library.openblas_set_num_threads(3)
print(*openblas.choices())
openblas.prefer(2)
with openblas.drafting_threads():
    print(*openblas.choices(), library.openblas_get_num_threads())
library.openblas_set_num_threads(1)
print(openblas.choices())
"""
    assert run(PACKAGE + code).stdout.split("\n") == ["3 2", "3 2 2", "()", ""]
    assert run(PACKAGE + "print(openblas.choices())", OPENBLAS_NUM_THREADS="2").stdout == "()\n"


@needs_openblas
def test_the_number_of_threads_is_measured() -> None:
    code = """
import ctypes
library = ctypes.CDLL("libopenblas.so.0")
print(openblas.fastest_threads(library, 1), openblas.fastest_threads(library, 2))
"""
    one, two = map(int, run(PACKAGE + code).stdout.split())
    assert one == 1
    assert two in (1, 2)


@needs_openblas
def test_threads_that_the_user_has_set_are_kept() -> None:
    done = run(THREADS, OPENBLAS_NUM_THREADS="2")
    seen = done.stdout.split()
    assert len(set(seen)) == 1


@needs_openblas
def test_generation_restores_the_number_of_threads_when_it_is_left(
    bundled_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = ctypes.CDLL("libopenblas.so.0").openblas_get_num_threads
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(openblas, "fastest_threads", lambda library, threads: threads + 1)
    drafter = mlx_distill.load_drafter(REFERENCE, *bundled_pair)
    before = threads()
    for leave in (lambda responses: responses.close(), list):
        responses = mlx_distill.stream_generate(
            *bundled_pair, "Once", drafter=drafter, max_tokens=12
        )
        next(responses)  # of the prompt, which all threads read
        next(responses)
        assert threads() == before + 1
        leave(responses)
        assert threads() == before
