"""Types are checked while the tests run; the fixtures find models and data.

Every command is tested with weights as a GPU loads them::

    def test_it_learns(tiny_on_a_gpu: Path) -> None:      # three tests: float16, bfloat16, 4 bits
    def test_it_reads(as_on_a_gpu: None, model_in: ModelIn) -> None:
        folder = model_in("stories-4m", "bfloat16")
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import scheduling
import type_checks

os.environ.setdefault("MLX_DISTILL_CALIBRATE", "0")  # no test measures this machine by itself
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is no folder here is looked for on the hub
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process would compile all it imports
scheduling.wait_for_turns()  # before there are threads
type_checks.install("mlx_distill")
import mlx_distill  # noqa: E402  (the BLAS comes first)

# isort: split
import mlx.core as mx  # noqa: E402
from commanding import expected, prompts  # noqa: E402, F401
from damage import refused  # noqa: E402, F401
from distilling import (  # noqa: E402, F401
    finished,
    no_curves,
    no_hub,
    refuses,
    tokenizer,
    world,
)
from drafting import (  # noqa: E402, F401
    drafters,
    pair,
    plain_answers,
    real_drafters,
    small,
)
from evaluating import folders  # noqa: E402, F401
from half_models import REFERENCE, TYPES, write_model, write_part  # noqa: E402
from precompiled import precompile  # noqa: E402
from read_tokenizers import read_once  # noqa: E402
from stored_types import Gpu  # noqa: E402

from mlx_distill import checkpoint, cli  # noqa: E402
from mlx_distill.checkpoint import bundled  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
read_once()  # a tenth of what many tests take
SHARED = Path(os.environ.get("MLX_DISTILL_SHARED", REPOSITORY.parent / "shared"))
ModelIn = Callable[[str, str], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Let MLX's compiler find its header precompiled; workers are given the environment."""
    cache = getattr(config, "cache", None)  # not there with -p no:cacheprovider
    if "PYTEST_XDIST_WORKER" not in os.environ and sys.platform == "linux" and cache:
        kept = cache.mkdir(f"precompiled-{version('mlx')}")
        precompile(Path(mx.__file__).parent / "include", kept)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes; tests that are named, in this one. ``-n`` decides."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    alone = named or config.option.usepdb or "PYTEST_XDIST_WORKER" in os.environ
    if not alone and config.getoption("numprocesses", default=0) is None:  # 0 without xdist
        config.option.numprocesses, config.option.dist = 2, "worksteal"
    if config.getoption("numprocesses", default=0):
        # The workers share the cores. A worker would say it too late: plugins import NumPy, whose
        # own BLAS would have other threads, and other bits, than in commands that tests start.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Let the collector pass over the thousands of tests and modules, which stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Check every function's calls anew in each test."""
    type_checks.begin()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data and checkpoints, or skip the test."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def bundled_part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two layers of the bundled model.

    The drafter of the published form fits them still; they take a third of the time.
    """
    return write_part(tmp_path_factory.mktemp("bundled") / "part", "stories-14m", (0, 7))


@pytest.fixture(scope="session")
def bundled_pair(bundled_part: Path) -> tuple[Any, Any]:
    """Return two layers of the bundled model, and its tokenizer; no test changes them."""
    return checkpoint.load(bundled_part)


@pytest.fixture(scope="session")
def whole_pair() -> tuple[Any, Any]:
    """Return all of the bundled model, of which drafts are right, and its tokenizer; as above."""
    return checkpoint.load(bundled("stories-14m"))


@pytest.fixture(scope="session")
def bundled_drafter(bundled_pair: tuple[Any, Any]) -> Any:
    """Return a drafter of the published form, trained for the bundled model, on those layers."""
    return mlx_distill.load_drafter(REFERENCE, *bundled_pair)


@pytest.fixture
def bundled_once(monkeypatch: pytest.MonkeyPatch, bundled_pair: tuple[Any, Any]) -> None:
    """Let the commands that take the bundled model by default find it loaded and opened.

    That is half a second of each; what they do with it is tested all the same.
    """
    load = cli.load_model

    def loaded(arguments: argparse.Namespace, config: Any = None) -> tuple[Any, Any]:
        default = arguments.model is None and arguments.adapter_path is None
        return bundled_pair if default else load(arguments, config)

    monkeypatch.setattr(cli, "load_model", loaded)
    drafter = {"stories-14m-redrafter": REFERENCE}
    monkeypatch.setattr(checkpoint, "bundled", lambda x: drafter.get(x) or bundled(x))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return how crowded this machine is said to be, whoever asks; at first it is quiet."""
    others = [0.0]
    monkeypatch.setattr("mlx_distill.calibration.crowding._look", lambda: others[0])
    return others


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be loaded in the types of their files, as on a GPU."""
    monkeypatch.setattr(checkpoint, "mx", Gpu())


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be called as its users do, without the type checks of the tests."""
    monkeypatch.setattr(type_checks, "CALLS", 0)


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """Let MLX fuse nothing, which takes a C++ compiler off a GPU, where this is not looked at."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def model_in(tmp_path_factory: pytest.TempPathFactory) -> ModelIn:
    """Return what gives a model's folder by name (`write_model`) and type; each is written once."""
    root = tmp_path_factory.mktemp("half")

    def folder(name: str, weights_type: str) -> Path:
        where = root / f"{name}-{weights_type}"
        return where if where.exists() else write_model(where, name, weights_type)

    return folder


@pytest.fixture(params=TYPES)
def tiny_on_a_gpu(request: pytest.FixtureRequest, as_on_a_gpu: None, model_in: ModelIn) -> Path:
    """Return a tiny model's folder in every type, to be loaded as a GPU would."""
    return model_in("tiny", request.param)
