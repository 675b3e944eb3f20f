"""Whether a kernel's results are those of its twin."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import to_number
from mlx_distill.kernels.choice import Case

# Roundings of a type, relative, that two orders of the same sum may differ by.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def differs(absolute: Mapping[str, float]) -> Callable[[Case, Any, Any], str]:
    """Return what says in which field two results differ, or "" if in none.

    Integers have to be equal; of floats 1e-5 of the value in float32, or some roundings of a half
    precision, relative to the larger of the value and 1.

    Args:
        absolute: Other tolerances of fields, by name.
    """

    def difference(case: Case, found: Any, expected: Any) -> str:
        for name in expected._fields:
            a, b = getattr(found, name), getattr(expected, name)
            if a is None or b is None:
                if a is not b:
                    return f"{name} is missing in one, at {case.name}"
                continue
            if a.shape != b.shape:
                return f"{name} has shape {a.shape}, not {b.shape}"
            most = absolute.get(name, TOLERANCES.get(b.dtype, 0.0))
            off = largest_difference(a, b)
            if not off <= most:
                return f"{name} is off by {off:.3g}, more than {most:g}, at {case.name}"
        return ""

    return difference


def largest_difference(found: mx.array, expected: mx.array) -> float:
    """Return the largest difference of two arrays, relative where values are above 1.

    Equal infinities, and what is no number in both, do not differ; elsewhere they do, infinitely.
    """
    if not found.size:
        return 0.0
    if not mx.issubdtype(expected.dtype, mx.floating):
        return 0.0 if mx.array_equal(found, expected).item() else float("inf")
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    same = (a == b) | (mx.isnan(a) & mx.isnan(b))
    off = mx.abs(a - b) / mx.maximum(1, mx.abs(b))
    off = mx.where(mx.isnan(off), mx.inf, off)
    return float(to_number(mx.where(same, 0, off).max()))
