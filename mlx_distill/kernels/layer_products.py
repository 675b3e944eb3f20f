"""What a layer does around its products of a few rows, in the same dispatch.

    joined    the norm before, and several products of the same rows: queries, keys and values
    gated     the norm before, and a gate (SiLU) before what it lets through
    added     the rows that a product's result is added to

One dispatch each, where MLX's operations are two to four.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import mlx.core as mx
import numpy as np
from jaxtyping import Float
from mlx_lm.models.activations import swiglu

from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.product_cases import exact, matrix, off, some, tried
from mlx_distill.kernels.product_source import LEAST_COLUMNS, Matrix, Norm, launch, takes
from mlx_distill.kernels.products import few_rows

NORMED = 3  # times the roundings of a product: of the rows before, of a gate behind
WIDTHS = (LEAST_COLUMNS, 31, 32, 65)


def _normed(x: Float[mx.array, "N K"], norm: Norm) -> Float[mx.array, "N K"]:
    return mx.fast.rms_norm(x, *norm)


def _takes_normed(x: mx.array, norm: Norm, matrices: Sequence[Matrix]) -> bool:
    return takes(x, matrices) and norm.weight.dtype == x.dtype


def _normed_exactly(x: mx.array, norm: Norm) -> mx.array:
    return mx.fast.rms_norm(x.astype(mx.float32), norm.weight.astype(mx.float32), norm.eps)


# --------------------------------------------------------------------------------------- joined


def _joined_kernel(
    x: Float[mx.array, "N K"], norm: Norm, matrices: tuple[Matrix, ...]
) -> tuple[Float[mx.array, "N _"], ...]:
    ends = list(accumulate(one.weight.shape[0] for one in matrices))
    return tuple(mx.split(launch(x, matrices, norm=norm), ends[:-1], axis=1))


def _joined_twin(
    x: Float[mx.array, "N K"], norm: Norm, matrices: tuple[Matrix, ...]
) -> tuple[Float[mx.array, "N _"], ...]:
    rows = _normed(x, norm)
    return tuple(few_rows.twin(rows, *one) for one in matrices)


def _joined_differ(case: Case, found: tuple[mx.array, ...], expected: tuple[mx.array, ...]) -> str:
    x, norm, matrices = case.args
    rows = _normed_exactly(x, norm)
    for one, by_kernel, by_twin in zip(matrices, found, expected, strict=True):
        right = exact(rows, one)
        wrong = off("kernel", by_kernel, right.value, NORMED * right.size) or off(
            "twin", by_twin, right.value, NORMED * right.parts
        )
        if wrong:
            return f"{wrong} at {case.name}"
    return ""


def _joined_cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        like = tried(random)
        bias, count = bool(random.random() < 0.3), int(random.integers(2, 4))
        widths = [int(random.choice(WIDTHS)) for _ in range(count)]
        matrices = tuple(matrix(random, like, width, bias) for width in widths)
        norm = Norm(some(random, like.rows.shape[1], like=like), 1e-5)
        yield Case(f"{like.name} by {widths}", (like.rows, norm, matrices), {})


joined = Operation(
    "joined_products", _joined_kernel, _joined_twin, _joined_cases, _joined_differ, _takes_normed
)
"""Return the products of normed rows with several matrices.

Args:
    x: The rows.
    norm: Of the rows, before.
    matrices: Two or three of one kind.
"""

# ---------------------------------------------------------------------------------------- gated


def _gated_kernel(
    x: Float[mx.array, "N K"], norm: Norm, gate: Matrix, up: Matrix
) -> Float[mx.array, "N O"]:
    return launch(x, (gate, up), norm=norm, gated=True)


def _gated_twin(
    x: Float[mx.array, "N K"], norm: Norm, gate: Matrix, up: Matrix
) -> Float[mx.array, "N O"]:
    rows = _normed(x, norm)
    return swiglu(few_rows.twin(rows, *gate), few_rows.twin(rows, *up))


def _gated_differ(case: Case, found: mx.array, expected: mx.array) -> str:
    x, norm, gate, up = case.args
    rows = _normed_exactly(x, norm)
    gates, ups = exact(rows, gate), exact(rows, up)
    opened = gates.value * mx.sigmoid(gates.value)
    value = opened * ups.value
    # SiLU is nowhere steeper than 1.1.
    rooms = [
        NORMED * (1.1 * a * mx.abs(ups.value) + mx.abs(opened) * b + 2 * mx.abs(value))
        for a, b in ((gates.size, ups.size), (gates.parts, ups.parts))
    ]
    wrong = off("kernel", found, value, rooms[0]) or off("twin", expected, value, rooms[1])
    return f"{wrong} at {case.name}" if wrong else ""


def _gated_cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        like, width = tried(random), int(random.choice(WIDTHS))
        bias = bool(random.random() < 0.3)
        matrices = [matrix(random, like, width, bias) for _ in range(2)]
        norm = Norm(some(random, like.rows.shape[1], like=like), 1e-5)
        yield Case(f"{like.name} by {width}", (like.rows, norm, *matrices), {})


def _takes_gated(x: mx.array, norm: Norm, gate: Matrix, up: Matrix) -> bool:
    return _takes_normed(x, norm, (gate, up)) and gate.weight.shape == up.weight.shape


gated = Operation(
    "gated_product", _gated_kernel, _gated_twin, _gated_cases, _gated_differ, _takes_gated
)
"""Return SiLU of the products of normed rows with one matrix, times those with another.

Args:
    x: The rows.
    norm: Of the rows, before.
    gate: The matrix of the gate.
    up: The other one.
"""

# ---------------------------------------------------------------------------------------- added


def _added_kernel(
    x: Float[mx.array, "N K"], by: Matrix, rows: Float[mx.array, "N O"]
) -> Float[mx.array, "N O"]:
    return launch(x, (by,), added=rows)


def _added_twin(
    x: Float[mx.array, "N K"], by: Matrix, rows: Float[mx.array, "N O"]
) -> Float[mx.array, "N O"]:
    return rows + few_rows.twin(x, *by)


def _added_differ(case: Case, found: mx.array, expected: mx.array) -> str:
    x, by, rows = case.args
    right, wide = exact(x, by), rows.astype(mx.float32)
    value, more = right.value + wide, 2 * mx.abs(wide)
    wrong = off("kernel", found, value, 2 * right.size + more) or off(
        "twin", expected, value, right.parts + more
    )
    return f"{wrong} at {case.name}" if wrong else ""


def _added_cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        like, width = tried(random), int(random.choice(WIDTHS))
        by = matrix(random, like, width, bool(random.random() < 0.3))
        rows = some(random, like.rows.shape[0], width, like=like)
        yield Case(f"{like.name} by {width}", (like.rows, by, rows), {})


added = Operation(
    "added_product",
    _added_kernel,
    _added_twin,
    _added_cases,
    _added_differ,
    lambda x, by, rows: takes(x, (by,)) and rows.dtype == x.dtype,
)
"""Return the product of rows with a matrix, added to others.

Args:
    x: The rows.
    by: The matrix.
    rows: What the product is added to.
"""
