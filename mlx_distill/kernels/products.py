"""Products of a few rows with a matrix: each weight is read and unpacked once for all rows.

    x (N, K), N up to 16        weights (O, K): float32, float16, bfloat16, or packed:
    x @ weights.T (N, O)        affine with 4 or 8 bits in groups of 32, 64 or 128; mxfp4

A group of threads makes 32 columns of the result. Its simdgroups share out K in blocks of 64, and
each unpacks 16 x 32 weights at a time, which 8 x 8 matrices multiply with all rows. At the end the
simdgroups' sums are added in their order. Which weights meet in which order depends on K alone, so
a row's result does not depend on how many rows there are: not to the last bit.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.kernels.choice import Case, Operation, chosen
from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST_ROWS = 16
COLUMNS = 32
# Simdgroups of a threadgroup, as many as its memory has room for.
SPLITS = {mx.float32: 4, mx.float16: 8, mx.bfloat16: 8}
# Of the size of what is summed: its order in float32, or the roundings of half precision.
ROUNDING = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class Packed(NamedTuple):
    """What is known of packed weights, beside them.

    Args:
        scales: One a group.
        biases: One a group; None where the mode has none.
        group_size: Weights in a group.
        bits: Of a weight.
        mode: mlx's name of the way they are packed.
    """

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str


# Where VALUE stands, the weight of column ``column`` at ``at`` is fetched.
BODY = """
  SHARED(T, weights, SPLIT * 16 * 32);
  SHARED(T, values, SPLIT * 16 * 8 * TILES);
  SHARED(float, partial, SPLIT * 8 * 32);
  uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
  int depth = x_shape[1], rows = x_shape[0], columns = weight_shape[0];
  int column = threadgroup_position_in_grid.x * 32 + lane;
  int known = column < columns ? column : columns - 1;  // beyond the last, what nobody keeps
  Tile<float> sums[4 * TILES];
  for (int i = 0; i < 4 * TILES; i++) {
    tile_fill(sums[i], 0.0f);
  }
  int own = part * 16 * 32, mine = part * 16 * 8 * TILES;
  for (int block = part * 64; block < depth; block += SPLIT * 64) {
    for (int begin = block; begin < block + 64 && begin < depth; begin += 16) {
      for (int i = 0; i < 16; i++) {
        int at = begin + i;
        weights[own + i * 32 + lane] = at < depth ? T(VALUE) : T(0.0f);
      }
      for (int i = lane; i < 16 * 8 * TILES; i += 32) {
        int row = i / 16, at = begin + i % 16;
        values[mine + i] = row < rows && at < depth ? x[long(row) * depth + at] : T(0.0f);
      }
      simd_barrier();
      for (int k = 0; k < 16; k += 8) {
        Tile<T> right[4];
        for (int i = 0; i < 4; i++) {
          tile_load(right[i], weights + (own + k * 32 + i * 8), 32, lane);
        }
        for (int row = 0; row < TILES; row++) {
          Tile<T> left;
          tile_load(left, values + (mine + row * 8 * 16 + k), 16, lane);
          for (int i = 0; i < 4; i++) {
            tile_multiply_add(sums[row * 4 + i], left, right[i], lane);
          }
        }
      }
      simd_barrier();
    }
  }
  for (int row = 0; row < TILES; row++) {
    for (int i = 0; i < 4; i++) {
      tile_store(sums[row * 4 + i], partial + (part * 256 + i * 8), 32, lane);
    }
    barrier();
    for (int i = part * 32 + lane; i < 256; i += SPLIT * 32) {
      float sum = 0.0f;
      for (int other = 0; other < SPLIT; other++) {
        sum += partial[other * 256 + i];
      }
      int r = row * 8 + i / 32, c = threadgroup_position_in_grid.x * 32 + i % 32;
      if (r < rows && c < columns) {
        float more = HAS_BIAS ? float(bias[c]) : 0.0f;
        out[long(r) * columns + c] = T(sum + more);
      }
    }
    barrier();
  }
"""
FUNCTIONS = """
// What a 4-bit float stands for: a sign, two bits of exponent, one of mantissa.
FUNCTION float small_float(uint code) {
  uint exponent = code >> 1 & 3u, last = code & 1u;
  float size = exponent == 0u ? 0.5f * float(last)
      : (1.0f + 0.5f * float(last)) * float(1u << exponent) * 0.5f;
  return code & 8u ? -size : size;
}
// A power of two, of which the exponent is kept.
FUNCTION float power_of_two(uint exponent) {
  return float_of(exponent == 0u ? 0x00400000u : exponent << 23);
}
"""
DENSE = "float(weight[long(known) * depth + at])"
CODE = (
    "(uint(weight[long(known) * (depth * BITS / 32) + at * BITS / 32])"
    " >> (at * BITS % 32) & ((1u << BITS) - 1u))"
)
GROUP = "[long(known) * (depth / GROUP) + at / GROUP]"
AFFINE = f"float(scales{GROUP}) * float({CODE}) + float(biases{GROUP})"
MXFP4 = f"power_of_two(uint(scales{GROUP})) * small_float({CODE})"


def _program(name: str, inputs: tuple[str, ...], value: str) -> Program:
    body = BODY.replace("VALUE", value)
    return Program(f"few_rows_{name}", ("x", "weight", *inputs, "bias"), ("out",), body, FUNCTIONS)


PROGRAMS = {
    "dense": _program("dense", (), DENSE),
    "affine": _program("affine", ("scales", "biases"), AFFINE),
    "mxfp4": _program("mxfp4", ("scales",), MXFP4),
}


def _kernel(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> Float[mx.array, "N O"]:
    split, columns = SPLITS[x.dtype], weight.shape[0]
    template: list[tuple[str, Any]] = [("T", x.dtype), ("SPLIT", split)]
    template += [("TILES", -(-x.shape[0] // 8)), ("HAS_BIAS", bias is not None)]
    inputs = [x, weight]
    if packed is not None:
        inputs += [packed.scales] if packed.biases is None else [packed.scales, packed.biases]
        template += [("BITS", packed.bits), ("GROUP", packed.group_size)]
    groups = -(-columns // COLUMNS)
    program = PROGRAMS[packed.mode if packed is not None else "dense"]
    return program(
        [*inputs, _nothing(x.dtype) if bias is None else bias],
        template=template,
        grid=(groups * split * SIMD_WIDTH, 1, 1),
        threadgroup=(split * SIMD_WIDTH, 1, 1),
        output_shapes=[(x.shape[0], columns)],
        output_dtypes=[x.dtype],
    )[0]


@cache
def _nothing(dtype: mx.Dtype) -> Float[mx.array, " 1"]:
    """Return what is given where there is no bias; made once, since making it is a dispatch."""
    made = mx.zeros(1, dtype)
    mx.eval(made)
    return made


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
    if (
        x.shape[0] > MOST_ROWS
        or x.dtype not in SPLITS
        or (bias is not None and bias.dtype != x.dtype)
    ):
        return False
    if packed is None:
        return weight.dtype == x.dtype
    if packed.mode == "affine":
        same = packed.biases is not None and packed.scales.dtype == packed.biases.dtype == x.dtype
        return same and packed.bits in (4, 8) and packed.group_size in (32, 64, 128)
    return packed.mode == "mxfp4" and packed.group_size == 32


def one_by_one(
    x: Float[mx.array, "N K"], weight: mx.array, bias: mx.array | None, packed: Packed | None
) -> Float[mx.array, "N O"]:
    """Return the product of each row as a call with that row alone makes it, to the last bit.

    The rows are a batch of matrices of one row, by copies of the weights that take no memory: MLX
    multiplies such one after the other, and would otherwise make one matrix of them. Packed weights
    are multiplied row by row anyway on a CPU, and by vectors on a GPU, if the rows are a batch.
    """
    count, rows = x.shape[0], x[:, None]
    if packed is not None:
        if mx.default_device() == mx.Device(mx.cpu):
            return _twin(x, weight, bias, packed)
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
    x, weight, bias, packed = case.args
    weight, offset = weight.astype(mx.float32) if packed is None else weight, mx.zeros(1)
    if packed is not None:
        names = {"group_size": packed.group_size, "bits": packed.bits, "mode": packed.mode}
        parts = (packed.scales, packed.biases)
        if packed.biases is not None:
            parts = tuple(part.astype(mx.float32) for part in parts)
        offset = mx.dequantize(mx.zeros_like(weight), *parts, **names).astype(mx.float32)
        weight = mx.dequantize(weight, *parts, **names).astype(mx.float32)
    more = mx.zeros(1) if bias is None else bias.astype(mx.float32)
    wide = x.astype(mx.float32)
    exact, size = wide @ weight.T + more, mx.abs(wide) @ mx.abs(weight).T + mx.abs(more)
    # MLX's own rounds a weight's two parts, of which it may be a small difference.
    parts_size = size + 2 * (mx.abs(wide) @ mx.broadcast_to(mx.abs(offset), weight.shape).T)
    for name, result, room in (("kernel", found, size), ("twin", expected, 4 * parts_size)):
        off = mx.abs(result.astype(mx.float32) - exact)
        same = (off <= ROUNDING[x.dtype] * room) | (mx.isnan(exact) & mx.isnan(result))
        if not same.all().item():
            worst = mx.where(same, 0, off / mx.maximum(room, 1e-30)).max().item()
            return f"the {name} is off by {worst:.3g} of what is summed at {case.name}"
    return ""


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    kinds = ["dense", ("affine", 4), ("affine", 8), "mxfp4"]
    while True:
        dtype = list(SPLITS)[random.integers(3)]
        rows, columns = int(random.integers(1, MOST_ROWS + 1)), int(random.choice([1, 31, 32, 65]))
        kind = kinds[random.integers(4)]
        group = 32 if kind == "mxfp4" else int(random.choice([32, 64, 128]))
        depth = group * int(random.integers(1, 6)) if kind != "dense" else 0
        depth = depth or int(random.choice([1, 7, 16, 63, 64, 129, 300, 520]))
        shape = str(
            random.choice(["normal", "zero", "large", "one-hot", "nan"], p=[0.6, *[0.1] * 4])
        )
        x = _rows(random, shape, rows, depth)
        weight = mx.array(random.normal(size=(columns, depth)).astype(np.float32)).astype(dtype)
        bias = None
        if random.random() < 0.3:
            bias = mx.array(random.normal(size=columns).astype(np.float32)).astype(dtype)
        packed = None
        if kind != "dense":
            mode, bits = kind if isinstance(kind, tuple) else (kind, 4)
            weight, scales, *biases = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
            packed = Packed(scales, biases[0] if biases else None, group, bits, mode)
        name = f"{shape} {rows} x {depth} by {columns}, {kind}, {dtype}"
        yield Case(name, (x.astype(dtype), weight, bias, packed), {})


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


few_rows = Operation("few_rows", _kernel, _twin, _cases, _differ, _takes)
"""Return the product of a few rows with a matrix, and a bias added.

Args:
    x: The rows.
    weight: The matrix, a row per column of the result; packed in 32-bit words, or not.
    bias: One a column; None for none.
    packed: How the weights are packed; None where they are not.
"""
