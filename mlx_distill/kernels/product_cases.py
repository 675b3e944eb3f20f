"""What products of a few rows are tried on, and by how much they may be off."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.kernels.product_source import MOST_ROWS, SPLITS, Matrix, Packed

# Of the size of what is summed: its order in float32, or the roundings of half precision.
ROUNDING = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
PACKINGS = ("dense", ("affine", 4), ("affine", 8), "mxfp4")
SHAPES = ("normal", "zero", "large", "one-hot", "nan")


class Tried(NamedTuple):
    """What a case is about.

    Args:
        name: Says all of it.
        dtype: Of the rows.
        packing: How the weights are packed.
        group: Weights in a group.
        rows: The rows.
    """

    name: str
    dtype: mx.Dtype
    packing: str | tuple[str, int]
    group: int
    rows: Float[mx.array, "N K"]


def tried(random: np.random.Generator) -> Tried:
    """Return some rows, and how the weights are packed that they are multiplied by."""
    dtype = list(SPLITS)[random.integers(3)]
    rows, packing = int(random.integers(1, MOST_ROWS + 1)), PACKINGS[random.integers(4)]
    group = 32 if packing == "mxfp4" else int(random.choice([32, 64, 128]))
    depth = int(random.choice([1, 7, 16, 63, 64, 129, 300, 520]))
    depth = depth if packing == "dense" else group * int(random.integers(1, 6))
    shape = str(random.choice(SHAPES, p=[0.6, *[0.1] * 4]))
    name = f"{shape} {rows} x {depth}, {packing}, {dtype}"
    return Tried(name, dtype, packing, group, _rows(random, shape, rows, depth).astype(dtype))


def _rows(random: np.random.Generator, shape: str, rows: int, depth: int) -> mx.array:
    """Return rows of a kind."""
    x = random.normal(size=(rows, depth)).astype(np.float32)
    if shape == "zero":
        x[:] = 0
    elif shape == "large":
        x *= 100
    elif shape == "one-hot":
        x[:] = np.arange(depth) == random.integers(depth)
    elif shape == "nan":
        x[random.integers(rows), random.integers(depth)] = np.nan
    return mx.array(x)


def some(random: np.random.Generator, *shape: int, like: Tried) -> mx.array:
    """Return normal numbers."""
    return mx.array(random.normal(size=shape).astype(np.float32)).astype(like.dtype)


def matrix(random: np.random.Generator, like: Tried, columns: int, bias: bool) -> Matrix:
    """Return a matrix that rows are multiplied by."""
    weight = some(random, columns, like.rows.shape[1], like=like)
    offset = some(random, columns, like=like) if bias else None
    if like.packing == "dense":
        return Matrix(weight, offset)
    mode, bits = like.packing if isinstance(like.packing, tuple) else (like.packing, 4)
    weight, scales, *biases = mx.quantize(weight, group_size=like.group, bits=bits, mode=mode)
    packed = Packed(scales, biases[0] if biases else None, like.group, bits, mode)
    return Matrix(weight, offset, packed)


class Exact(NamedTuple):
    """A product in float32.

    Args:
        value: The product.
        size: Of what is summed.
        parts: The same of MLX's own sums: it rounds a weight's two parts, of which the weight may
            be a small difference.
    """

    value: Float[mx.array, "N O"]
    size: Float[mx.array, "N O"]
    parts: Float[mx.array, "N O"]


def exact(x: Float[mx.array, "N K"], by: Matrix) -> Exact:
    """Return a product, and the size of what is summed."""
    weight, bias, packed = by
    weight, offset = weight.astype(mx.float32) if packed is None else weight, mx.zeros(1)
    if packed is not None:
        offset, weight = _unpacked(mx.zeros_like(weight), packed), _unpacked(weight, packed)
    more = mx.zeros(1) if bias is None else bias.astype(mx.float32)
    wide = x.astype(mx.float32)
    value, size = wide @ weight.T + more, mx.abs(wide) @ mx.abs(weight).T + mx.abs(more)
    doubled = 2 * (mx.abs(wide) @ mx.broadcast_to(mx.abs(offset), weight.shape).T)
    return Exact(value, size, 4 * (size + doubled))


def _unpacked(weight: mx.array, packed: Packed) -> Float[mx.array, "O K"]:
    scales, biases, size, bits, mode = packed
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    unpacked = mx.dequantize(weight, scales, biases, group_size=size, bits=bits, mode=mode)
    return unpacked.astype(mx.float32)


def off(who: str, found: mx.array, value: mx.array, room: mx.array) -> str:
    """Return by how much results are off, if by more than rounding; ``room`` is what is summed."""
    apart = mx.abs(found.astype(mx.float32) - value)
    same = (apart <= ROUNDING[found.dtype] * room) | (mx.isnan(value) & mx.isnan(found))
    if same.all().item():
        return ""
    worst = mx.where(same, 0, apart / mx.maximum(room, 1e-30)).max().item()
    return f"the {who} is off by {worst:.3g} of what is summed"
