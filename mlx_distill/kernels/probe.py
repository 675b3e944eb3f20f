"""Whether a kernel may be trusted on this machine: it is compared with its twin, then timed.

The comparison is over the shapes in use and over random and adversarial ones. The times are of a
sustained run: a GPU that has just been idle tells little, and neither do weights that lie in its
cache, so that every call is given its own copy of them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import num_bytes
from mlx_distill.errors import one_line
from mlx_distill.kernels.choice import Case, Operation

Clock = Callable[[], float]
COMPARED = 24  # cases beside those in use
COLD_BYTES = 2**28  # more than any chip's caches hold
MOST_COPIES = 64
ROUNDS = 7
# What is not clearly faster is left as it is: it was measured once.
CLEARLY = 0.97


@dataclass(frozen=True)
class Verdict:
    """What was found of a kernel.

    Args:
        name: Of the operation.
        fault: In what it differs from its twin, or why it does not run; "" if it is right.
        kernel_s: Seconds of a call, over the shapes in use; 0 where it was not timed.
        twin_s: The twin's.
    """

    name: str
    fault: str
    kernel_s: float = 0.0
    twin_s: float = 0.0

    @property
    def used(self) -> bool:
        """Whether it is right, and faster in the shapes in use."""
        return not self.fault and 0 < self.kernel_s <= CLEARLY * self.twin_s


def probe(
    operation: Operation[..., Any],
    in_use: Sequence[Case],
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Verdict:
    """Return what is found of a kernel.

    Args:
        operation: What it does.
        in_use: Cases with the shapes that it is used with; without any it is not timed.
        seed: Of the cases that are made up.
        clock: Returns the seconds since some time.
    """
    others = itertools.islice(operation.cases(seed), COMPARED)
    for case in itertools.chain(in_use, others):
        fault = _fault(operation, case)
        if fault:
            return Verdict(operation.name, fault)
    if not in_use:
        return Verdict(operation.name, "")
    times = [timed(operation, case, clock) for case in in_use]
    kernel_s, twin_s = (sum(pair[which] for pair in times) for which in range(2))
    return Verdict(operation.name, "", kernel_s, twin_s)


def _fault(operation: Operation[..., Any], case: Case) -> str:
    if not operation.takes(*case.args, **case.options):
        return ""
    try:
        found = operation.tried(operation.kernel, case)
        mx.eval(found)
    except (RuntimeError, ValueError, TypeError) as error:  # it does not compile, or is not taken
        return f"it does not run: {one_line(error)[:200]}"
    return operation.differ(case, found, operation.tried(operation.twin, case))


def timed(
    operation: Operation[..., Any], case: Case, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Return the seconds of a call of the kernel and of the twin, in turn, each of cold arrays."""
    size = max(1, num_bytes([case.args, dict(case.options)]))
    copies = [_copy(case) for _ in range(min(MOST_COPIES, -(-COLD_BYTES // size)))]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS + 1):
        for kernel in (True, False):
            function = operation.kernel if kernel else operation.twin
            begin = clock()
            mx.eval([operation.tried(function, copy) for copy in copies])
            if number:  # the first one warms up
                seconds[kernel].append((clock() - begin) / len(copies))
    return statistics.median(seconds[True]), statistics.median(seconds[False])


def _copy(case: Case) -> Case:
    """Return a case whose arrays lie elsewhere."""
    made: list[mx.array] = []

    def copied(x: Any) -> Any:
        if isinstance(x, mx.array):
            made.append(mx.where(mx.array(True), x, x))
            return made[-1]
        if isinstance(x, tuple):
            parts = [copied(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x

    args = copied(case.args)
    options = {name: copied(value) for name, value in case.options.items()}
    mx.eval(made)
    return Case(case.name, args, options)


def trusted(verdicts: Sequence[Verdict]) -> Mapping[str, bool]:
    """Return which kernels are used."""
    return {verdict.name: verdict.used for verdict in verdicts}
