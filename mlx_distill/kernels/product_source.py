"""The source of products of a few rows with matrices, and what may stand before and behind them.

A group of threads makes 32 columns of the result. Its simdgroups share out K in blocks of 64, and
each unpacks 16 x 32 weights at a time, which 8 x 8 matrices multiply with all rows. At the end the
simdgroups' sums are added in their order. Which weights meet in which order depends on K alone, so
a row's result does not depend on how many rows there are: not to the last bit.

Several matrices of one kind are multiplied by the same rows in one launch: their columns lie side
by side, or two of them are a gate and what it lets through, which the same threads make in turn.
Rows may be divided by their root mean square first, and others be added to the result.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST_ROWS = 16
COLUMNS = 32
# Simdgroups of a threadgroup, as many as its memory has room for.
SPLITS = {mx.float32: 4, mx.float16: 8, mx.bfloat16: 8}
# Metal keeps shorter arrays elsewhere, so that one name could not stand for either of two.
LEAST_COLUMNS = 8


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


class Matrix(NamedTuple):
    """What rows are multiplied by.

    Args:
        weight: A row per column of the result; packed in 32-bit words, or not.
        bias: One a column; None for none.
        packed: How the weights are packed; None where they are not.
    """

    weight: mx.array
    bias: mx.array | None = None
    packed: Packed | None = None


class Norm(NamedTuple):
    """A root mean square norm of rows.

    Args:
        weight: One a value of a row.
        eps: Added to the mean of the squares.
    """

    weight: Float[mx.array, " K"]
    eps: float


# Where VALUE stands, the weight of column ``known`` at ``at`` is fetched.
BODY = """
  SHARED(T, weights, SPLIT * 16 * 32);
  SHARED(T, values, SPLIT * 16 * 8 * TILES);
  SHARED(float, partial, SPLIT * 8 * 32);
  SHARED(float, inverses, 16);
  uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
  int depth = x_shape[1], rows = x_shape[0], group = threadgroup_position_in_grid.x;
  MATRIX
  if (NORM) {
    for (int row = part; row < rows; row += SPLIT) {
      float squares = 0.0f;
      for (int at = lane; at < depth; at += 32) {
        float value = x[long(row) * depth + at];
        squares = fma(value, value, squares);
      }
      squares = simd_sum(squares);
      if (lane == 0) {
        inverses[row] = 1.0f / sqrt(squares / float(depth) + eps[0]);
      }
    }
    barrier();
  }
  Tile<float> sums[4 * TILES];
  float gates[8 * TILES / SPLIT];
  int own = part * 16 * 32, mine = part * 16 * 8 * TILES;
  for (int turn = 0; turn < (GATED ? 2 : 1); turn++) {
    SECOND
    int known = group * 32 + int(lane);
    known = known < columns ? known : columns - 1;  // beyond the last, what nobody keeps
    for (int i = 0; i < 4 * TILES; i++) {
      tile_fill(sums[i], 0.0f);
    }
    for (int block = part * 64; block < depth; block += SPLIT * 64) {
      for (int begin = block; begin < block + 64 && begin < depth; begin += 16) {
        for (int i = 0; i < 16; i++) {
          int at = begin + i;
          weights[own + i * 32 + lane] = at < depth ? T(VALUE) : T(0.0f);
        }
        for (int i = lane; i < 16 * 8 * TILES; i += 32) {
          int row = i / 16, at = begin + i % 16;
          bool there = row < rows && at < depth;
          T value = there ? T(x[long(row) * depth + at]) : T(0.0f);
          if (NORM && there) {
            value = T(float(norm[at]) * float(T(float(value) * inverses[row])));
          }
          values[mine + i] = value;
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
      for (int i = part * 32 + lane, j = row * 8 / SPLIT; i < 256; i += SPLIT * 32, j++) {
        float sum = 0.0f;
        for (int other = 0; other < SPLIT; other++) {
          sum += partial[other * 256 + i];
        }
        int r = row * 8 + i / 32, c = group * 32 + i % 32;
        if (r < rows && c < columns) {
          float result = float(T(sum + (HAS_BIAS ? float(bias[c]) : 0.0f)));
          if (GATED && turn == 0) {
            gates[j] = result;
            continue;
          }
          if (GATED) {
            result *= float(T(gates[j] / (1.0f + exp(-gates[j]))));
          }
          if (ADDED) {
            result = float(added[long(r) * total + c]) + float(T(result));
          }
          out[long(r) * total + first + c] = T(result);
        }
      }
      barrier();
    }
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
CODE = (
    "(uint(weight[long(known) * (depth * BITS / 32) + at * BITS / 32])"
    " >> (at * BITS % 32) & ((1u << BITS) - 1u))"
)
GROUP = "[long(known) * (depth / GROUP) + at / GROUP]"
# By the way weights are packed: the arrays of a matrix beside its bias, and a weight.
KINDS = {
    "dense": (("weight",), "float(weight[long(known) * depth + at])"),
    "affine": (
        ("weight", "scales", "biases"),
        f"float(scales{GROUP}) * float({CODE}) + float(biases{GROUP})",
    ),
    "mxfp4": (
        ("weight", "scales"),
        f"power_of_two(uint(scales{GROUP})) * small_float({CODE})",
    ),
}


@cache
def _program(kind: str, matrices: int, gated: bool) -> Program:
    names, value = KINDS[kind]
    names = (*names, "bias")
    body = BODY.replace("VALUE", value).replace("MATRIX", _first(names, 1 if gated else matrices))
    body = body.replace("SECOND", f"if (turn == 1) {{{_taken(names, 1)}}}" if gated else "")
    inputs = [f"{name}{number}" for number in range(matrices) for name in names]
    word = "gated" if gated else f"of_{matrices}"
    name = f"few_rows_{word}_{kind}"
    return Program(name, ("x", "norm", "eps", "added", *inputs), ("out",), body, FUNCTIONS)


def _first(names: Sequence[str], matrices: int) -> str:
    """Return statements that choose the matrix whose columns a group makes."""
    lines = [f"auto {name} = {name}0;" for name in names]
    lines.append("int columns = weight0_shape[0], total = columns, first = 0;")
    lines += [f"total += weight{number}_shape[0];" for number in range(1, matrices)]
    for number in range(1, matrices):
        lines.append("if (group >= (columns + 31) / 32) {")
        lines.append("  group -= (columns + 31) / 32;\n    first += columns;")
        lines.append(f"  columns = weight{number}_shape[0];{_taken(names, number)}")
    return "\n  ".join([*lines, "}" * (matrices - 1)])


def _taken(names: Sequence[str], number: int) -> str:
    return " ".join(f"{name} = {name}{number};" for name in names)


def launch(
    x: Float[mx.array, "N K"],
    matrices: Sequence[Matrix],
    *,
    norm: Norm | None = None,
    gated: bool = False,
    added: Float[mx.array, "N O"] | None = None,
) -> Float[mx.array, "N O"]:
    """Return the products of rows with matrices, side by side.

    Args:
        x: The rows.
        matrices: Of one kind.
        norm: Of the rows, before; None for none.
        gated: Whether the first matrix is a gate (SiLU) before the second.
        added: To the result; None for nothing.
    """
    split, first = SPLITS[x.dtype], matrices[0]
    flags = {"NORM": norm is not None, "GATED": gated, "ADDED": added is not None}
    template: list[tuple[str, Any]] = [("T", x.dtype), ("SPLIT", split)]
    template += [("TILES", -(-x.shape[0] // 8)), ("HAS_BIAS", first.bias is not None)]
    template += flags.items()
    if first.packed is not None:
        template += [("BITS", first.packed.bits), ("GROUP", first.packed.group_size)]
    nothing, eps = _nothing(x.dtype), None if norm is None else _number(norm.eps)
    before = [x, nothing if norm is None else norm.weight, _number(0.0) if eps is None else eps]
    widths = [matrix.weight.shape[0] for matrix in (matrices[:1] if gated else matrices)]
    groups = sum(-(-width // COLUMNS) for width in widths)
    kind = "dense" if first.packed is None else first.packed.mode
    return _program(kind, len(matrices), gated)(
        [*before, nothing if added is None else added, *_arrays(matrices, nothing)],
        template=template,
        grid=(groups * split * SIMD_WIDTH, 1, 1),
        threadgroup=(split * SIMD_WIDTH, 1, 1),
        output_shapes=[(x.shape[0], sum(widths))],
        output_dtypes=[x.dtype],
    )[0]


def _arrays(matrices: Sequence[Matrix], nothing: mx.array) -> list[mx.array]:
    found = []
    for weight, bias, packed in matrices:
        parts = () if packed is None else (packed.scales, packed.biases)
        found += [weight, *(part for part in parts if part is not None)]
        found.append(nothing if bias is None else bias)
    return found


@cache
def _nothing(dtype: mx.Dtype) -> Float[mx.array, " 1"]:
    """Return what is given where there is nothing; made once, since making it is a dispatch."""
    made = mx.zeros(1, dtype)
    mx.eval(made)
    return made


@cache
def _number(value: float) -> Float[mx.array, " 1"]:
    return mx.array([value], mx.float32)


def takes(x: Float[mx.array, "N K"], matrices: Sequence[Matrix]) -> bool:
    """Return whether the source is for such rows and matrices: few rows, matrices of one kind."""
    if x.shape[0] > MOST_ROWS or x.dtype not in SPLITS:
        return False
    biases = [matrix.bias for matrix in matrices]
    if any(bias is not None for bias in biases) and not _all_are(biases, x.dtype):
        return False
    kinds = {None if packed is None else packed[2:] for _, _, packed in matrices}
    short = any(matrix.weight.shape[0] < LEAST_COLUMNS for matrix in matrices)
    return len(kinds) == 1 and (len(matrices) == 1 or not short) and _is_known(x, matrices)


def _is_known(x: mx.array, matrices: Sequence[Matrix]) -> bool:
    for weight, _, packed in matrices:
        if packed is None:
            known = weight.dtype == x.dtype
        elif packed.mode == "affine":
            known = _all_are([packed.scales, packed.biases], x.dtype)
            known = known and packed.bits in (4, 8) and packed.group_size in (32, 64, 128)
        else:
            known = packed.mode == "mxfp4" and packed.group_size == 32
        if not known:
            return False
    return True


def _all_are(arrays: Sequence[mx.array | None], dtype: mx.Dtype) -> bool:
    return all(array is not None and array.dtype == dtype for array in arrays)
