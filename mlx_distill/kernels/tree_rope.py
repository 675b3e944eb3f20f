"""Rotary positions of a tree's nodes, rotated where they lie.

MLX's rope takes consecutive positions along a sequence, so nodes have to be turned into a batch and
back. Here a table has the cosine and the sine of every node and pair, once per call for all layers
whose ropes turn alike:

    table (N, D)   where a pair's first value lies, its cosine; where the second lies, its sine
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import largest_difference
from mlx_distill.kernels.program import SIMD_WIDTH, Program

THREADS = 256

PROGRAM = Program(
    name="tree_rope",
    inputs=("x", "table"),
    outputs=("out",),
    any_layout=True,
    body="""
  int heads = x_shape[1], nodes = x_shape[2], width = x_shape[3];
  int at = thread_position_in_grid.x;
  if (at < heads * nodes * width) {
    int column = at % width, node = at / width % nodes, head = at / width / nodes;
    long begin = head * long(x_strides[1]) + node * long(x_strides[2]);
    float own = x[begin + column * long(x_strides[3])];
    if (column < DIMS) {
      bool second = BY_TWO ? column % 2 == 1 : column >= DIMS / 2;
      int step = BY_TWO ? 1 : DIMS / 2, other = second ? column - step : column + step;
      float pair = x[begin + other * long(x_strides[3])];
      long row = node * long(table_strides[0]);
      float cosine = table[row + (second ? other : column) * long(table_strides[1])];
      float sine = table[row + (second ? column : other) * long(table_strides[1])];
      own = second ? fma(pair, sine, own * cosine) : fma(-pair, sine, own * cosine);
    }
    out[at] = T(own);
  }
""",
)


def _kernel(
    x: Float[mx.array, "1 H N D"], table: Float[mx.array, "N D"], dims: int, by_two: bool
) -> Float[mx.array, "1 H N D"]:
    threads = min(THREADS, -(-x.size // SIMD_WIDTH) * SIMD_WIDTH)
    return PROGRAM(
        [x, table],
        template=[("T", x.dtype), ("DIMS", dims), ("BY_TWO", by_two)],
        grid=(-(-x.size // threads) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


def _twin(
    x: Float[mx.array, "1 H N D"], table: Float[mx.array, "N D"], dims: int, by_two: bool
) -> Float[mx.array, "1 H N D"]:
    wide, half = x.astype(mx.float32), dims // 2
    firsts, seconds = (
        (slice(0, dims, 2), slice(1, dims, 2)) if by_two else (slice(half), slice(half, dims))
    )
    a, b, cosine, sine = wide[..., firsts], wide[..., seconds], table[:, firsts], table[:, seconds]
    turned = [a * cosine - b * sine, a * sine + b * cosine]
    if by_two:
        turned = [mx.stack(turned, axis=-1).flatten(-2)]
    rest = () if dims == x.shape[-1] else (wide[..., dims:],)
    return mx.concatenate([*turned, *rest], axis=-1).astype(x.dtype)


def _differ(case: Case, found: mx.array, expected: mx.array) -> str:
    most = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[expected.dtype]
    off = largest_difference(found, expected)
    return "" if off <= most else f"the rotation is off by {off:.3g} at {case.name}"


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        heads, nodes = int(random.integers(1, 9)), int(random.integers(1, 65))
        width = int(random.choice([2, 16, 64, 80, 128]))
        dims = width if random.random() < 0.7 else 2 * int(random.integers(1, width // 2 + 1))
        dtype = [mx.float32, mx.float16, mx.bfloat16][random.integers(3)]
        lies = str(random.choice(["by head", "by node", "apart"]))
        shape = {"by head": (heads, nodes, width), "by node": (nodes, heads, width)}
        values = random.normal(size=shape.get(lies, (heads, nodes, 2 * width)))
        x = mx.array(values.astype(np.float32)).astype(dtype)
        x = x.swapaxes(0, 1) if lies == "by node" else x
        x = x[..., ::2] if lies == "apart" else x
        table = mx.array(random.uniform(-1, 1, size=(nodes, width)).astype(np.float32))
        by_two = bool(random.integers(2))
        name = f"{heads} heads, {nodes} nodes, {dims} of {width}, {lies}, {dtype}"
        yield Case(name, (x[None], table, dims, by_two), {})


tree_rope = Operation("tree_rope", _kernel, _twin, _cases, _differ)
"""Return nodes rotated by a table, computed in float32.

Args:
    x: Queries or keys of the nodes, as they lie.
    table: Cosine and sine of every node's pairs; further columns are not looked at.
    dims: The first so many values of a head are rotated.
    by_two: Whether neighbours are a pair, and not the values of two halves.
"""
