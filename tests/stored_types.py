"""Weights as a GPU loads them: in the types that they are stored in.

Without a GPU ``mlx_distill.checkpoint.load`` makes every weight float32, since half precision is
emulated there. That hides what a training meets on a Mac. `Gpu` answers the loader's question for
the device; everything still runs on the CPU. As a program it runs a command so::

    python tests/stored_types.py distill --teacher ...
"""

import importlib
import sys
from typing import Any

import mlx_distill.checkpoint

import mlx.core as mx  # isort: skip  (the BLAS comes first)


class Gpu:
    """``mlx.core`` whose default device is none that the loader knows as a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    @staticmethod
    def default_device() -> str:
        return "a GPU"


def main(verb: str, arguments: list[str]) -> int:
    """Run a command with weights as a GPU loads them."""
    mlx_distill.checkpoint.mx = Gpu()  # type: ignore[assignment]
    return importlib.import_module(f"mlx_distill.{verb}").main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
