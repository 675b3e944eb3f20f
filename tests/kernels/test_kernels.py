"""Every kernel's source, executed here, against its twin: a small sample of ``run.py``'s cases."""

import itertools

import pytest

from mlx_distill.kernels.program import launching
from tests.kernels.harness import Harness, Noting, compile_together, no_compiler
from tests.kernels.run import load_all, wrong

pytestmark = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())

OPERATIONS = load_all()
SAMPLE = 6


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_kernel_does_what_its_twin_does(name: str) -> None:
    operation, harness, noting = OPERATIONS[name], Harness(seed=1), Noting()
    cases = list(itertools.islice(operation.cases(1), SAMPLE))
    with launching(noting):
        for case in cases:
            operation.tried(operation.kernel, case)
    compile_together(noting.launches)
    for case in cases:
        assert not wrong(operation, case, harness)
