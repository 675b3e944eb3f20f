"""Products of a few rows with a matrix: each weight is read and unpacked once for all rows.

    x (N, K), N up to 16        weights (O, K): float32, float16, bfloat16, or packed:
    x @ weights.T (N, O)        affine with 4 or 8 bits in groups of 32, 64 or 128; mxfp4

``product_source`` has the kernel.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.blas import openblas
from mlx_distill.kernels.choice import Case, Operation, chosen
from mlx_distill.kernels.product_cases import exact, matrix, off, tried
from mlx_distill.kernels.product_source import Matrix, Packed, launch, takes


def _kernel(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> Float[mx.array, "N O"]:
    return launch(x, [Matrix(weight, bias, packed)])


def _twin(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> Float[mx.array, "N O"]:
    if packed is not None:
        product = _unpacked_product(x, weight, packed)
        return product if bias is None else product + bias
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _takes(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> bool:
    return takes(x, [Matrix(weight, bias, packed)])


def one_by_one(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> Float[mx.array, "N O"]:
    """Return the product of each row as a call with that row alone makes it, to the last bit.

    The rows are a batch of matrices of one row, by copies of the weights that take no memory: MLX
    multiplies such one after the other, and would otherwise make one matrix of them. Packed weights
    are multiplied row by row anyway on a CPU, and by vectors on a GPU, if the rows are a batch.
    Our own products of a few rows keep a row's bits themselves, where rows lie behind each other.
    """
    count, rows = x.shape[0], x[:, None]
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    kept = packed is not None or (x.dtype == mx.float32 and count <= openblas.most_rows())
    if on_cpu and kept:
        return _twin(mx.contiguous(x), mx.contiguous(weight), bias, packed)
    if packed is not None:
        return mx.concatenate([_twin(row, weight, bias, packed) for row in rows])
    matrices = mx.broadcast_to(weight.T, (count, weight.shape[1], weight.shape[0]))
    return (rows @ matrices if bias is None else mx.addmm(bias, rows, matrices))[:, 0]


def few_rows_chosen() -> bool:
    """Return whether products of a few rows are made by their kernel."""
    return chosen(few_rows.name)


def _unpacked_product(x: mx.array, weight: mx.array, packed: Packed) -> mx.array:
    return mx.quantized_matmul(
        x,
        weight,
        packed.scales,
        packed.biases,
        transpose=True,
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
    )


def _differ(case: Case, found: mx.array, expected: mx.array) -> str:
    """Say where results differ by more than orders of a sum can: per size of what is summed."""
    x, *by = case.args
    right = exact(x, Matrix(*by))
    wrong = off("kernel", found, right.value, right.size) or off(
        "twin", expected, right.value, right.parts
    )
    return f"{wrong} at {case.name}" if wrong else ""


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        like, columns = tried(random), int(random.choice([1, 31, 32, 65]))
        by = matrix(random, like, columns, bool(random.random() < 0.3))
        yield Case(f"{like.name} by {columns}", (like.rows, *by), {})


few_rows = Operation("few_rows", _kernel, _twin, _cases, _differ, _takes)
"""Return the product of a few rows with a matrix, and a bias added.

Args:
    x: The rows.
    weight: The matrix, a row per column of the result; packed in 32-bit words, or not.
    bias: One a column; None for none.
    packed: How the weights are packed; None where they are not.
"""
