"""Many random cases of kernels in the harness: ``python -m tests.kernels.run --cases 2000``."""

import argparse
import itertools
import sys
import time
from collections import Counter
from importlib import import_module
from pkgutil import iter_modules

import mlx_distill.kernels
from mlx_distill.kernels.choice import OPERATIONS, Case, Operation
from mlx_distill.kernels.program import launching
from tests.kernels.harness import Harness, KernelFault


def load_all() -> dict[str, Operation]:
    """Return all operations of the package, by name."""
    for module in iter_modules(mlx_distill.kernels.__path__):
        import_module(f"mlx_distill.kernels.{module.name}")
    return OPERATIONS


def wrong(operation: Operation, case: Case, harness: Harness) -> str:
    """Return what a kernel does that its twin does not, or must not; "" if nothing."""
    try:
        with launching(harness):
            found = operation.tried(operation.kernel, case)
    except KernelFault as fault:
        return f"{fault} at {case.name}"
    return operation.differ(case, found, operation.tried(operation.twin, case))


def main(argv: list[str] | None = None) -> int:
    """Return 0 if all cases are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", nargs="*", help="names; all by default")
    options = parser.parse_args(argv)
    failed = 0
    for name, operation in load_all().items():
        if options.kernels and name not in options.kernels:
            continue
        harness, begin, faults = Harness(options.seed), time.perf_counter(), Counter()
        for case in itertools.islice(operation.cases(options.seed), options.cases):
            assert operation.takes(*case.args, **case.options), f"{name} does not take {case.name}"
            found = wrong(operation, case, harness)
            if found:
                faults[found.split(" at ")[0][:60]] += 1
                print(f"{name}: {found}", flush=True)
        took = time.perf_counter() - begin
        print(f"{name}: {options.cases} cases, {faults.total()} wrong, {took:.0f} s", flush=True)
        failed += faults.total()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
