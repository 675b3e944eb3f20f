"""Types are checked while the tests run; the fixtures find models and data."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

hook = install_import_hook("mlx_distill", "beartype.beartype")
import mlx_distill  # noqa: E402, F401

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MLX_DISTILL_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data and checkpoints, or skip the test."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not at {SHARED}")
    return SHARED
