"""Every kernel's source, executed here, against its twin: a small sample of ``run.py``'s cases."""

import itertools

import pytest

from tests.kernels.harness import Harness, compile_what_is_launched, no_compiler
from tests.kernels.run import load_all, wrong

pytestmark = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())

OPERATIONS = load_all()
SAMPLE = 6


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_kernel_does_what_its_twin_does(name: str) -> None:
    operation, harness = OPERATIONS[name], Harness(seed=1)
    cases = list(itertools.islice(operation.cases(1), SAMPLE))
    compile_what_is_launched(lambda: [operation.tried(operation.kernel, case) for case in cases])
    for case in cases:
        assert not wrong(operation, case, harness)
