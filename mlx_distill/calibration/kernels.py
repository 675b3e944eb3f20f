"""The kernels of a machine: which are used is found out with a pair's own shapes, once.

The shapes are those of some cycles of decoding in which whoever asks for an operation is noted.
"""

import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import mlx_distill.kernels
from mlx_distill.arrays import num_bytes
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.tasks import PLAN, Decoding
from mlx_distill.calibration.timing import Clock
from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.kernels.choice import OPERATIONS, Case, Operation, forced, mode, performing, trust
from mlx_distill.kernels.probe import Verdict, probe, trusted
from mlx_distill.kernels.program import has_gpu
from mlx_distill.target import joined_layers

CYCLES = 3
MOST_CASES = 3  # of an operation that are timed: those with most bytes


def probe_kernels(pair: Pair, context: int, clock: Clock = time.perf_counter) -> list[Verdict]:
    """Find out which kernels are right and faster here, and use those from now on.

    Where there is no GPU, or the choice was made by MLX_DISTILL_KERNELS, nothing is tried.
    """
    if mode() != "probe" or not has_gpu():
        return []
    cases = in_use(pair, context)
    verdicts = [probe(one, cases.get(name, []), clock=clock) for name, one in operations().items()]
    for verdict in verdicts:
        if verdict.fault:
            print(
                f"mlx_distill: the kernel {verdict.name} is not right here and is not used: "
                f"{verdict.fault}; please report this, with what "
                "python -m mlx_distill.calibrate --show prints",
                file=sys.stderr,
            )
    trust(trusted(verdicts))
    return verdicts


def operations() -> dict[str, Operation[..., Any]]:
    """Return all operations of the package, by name."""
    for module in pkgutil.iter_modules(mlx_distill.kernels.__path__):
        importlib.import_module(f"mlx_distill.kernels.{module.name}")
    return OPERATIONS


def in_use(pair: Pair, context: int) -> dict[str, list[Case]]:
    """Return what operations are asked for in some cycles, by name; their twins do it meanwhile."""
    found: dict[str, dict[object, Case]] = {}

    def note(operation: Operation[..., Any], *args: Any, **options: Any) -> Any:
        arrays = [x for _, x in tree_flatten([args, options]) if isinstance(x, mx.array)]
        shapes = tuple((x.shape, x.dtype) for x in arrays)
        cases = found.setdefault(operation.name, {})
        cases.setdefault(shapes, Case("a shape in use", args, options))
        return operation.twin(*args, **options)

    # Once more without joined layers: of what they are made where those kernels are not taken.
    runs = (GREEDY, ()), (GREEDY, joined_layers.NAMES), (Sampling(temperature=1.0), ())
    for law, but in runs:
        with forced(but=but), performing(note):
            Decoding(pair, PLAN, law, context, CYCLES)(time.perf_counter)
    return {name: _largest(list(cases.values())) for name, cases in found.items()}


def _largest(cases: Sequence[Case]) -> list[Case]:
    def size(case: Case) -> int:
        return num_bytes([case.args, dict(case.options)])

    return sorted(cases, key=size)[-MOST_CASES:]
