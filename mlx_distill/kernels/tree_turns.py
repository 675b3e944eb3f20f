"""Rotary positions of a tree's queries and keys in one dispatch, and the norm of each head before.

It does for both what ``tree_rope`` does for one of them, by the same table. A simdgroup takes a
head of a node.
"""

from collections.abc import Iterator
from typing import TypeAlias

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import largest_difference
from mlx_distill.kernels.product_source import Norm
from mlx_distill.kernels.program import SIMD_WIDTH, Program
from mlx_distill.kernels.tree_rope import tree_rope

SIMDGROUPS = 8
LEAST = 8  # values of an array; Metal keeps shorter ones elsewhere than the others
Pair: TypeAlias = tuple[Float[mx.array, "1 H N D"], Float[mx.array, "1 G N D"]]

PROGRAM = Program(
    name="tree_turns",
    inputs=("q", "k", "table", "q_norm", "k_norm", "eps"),
    outputs=("turned_q", "turned_k"),
    any_layout=True,
    body="""
  int heads = q_shape[1], nodes = q_shape[2], width = q_shape[3], lane = thread_index_in_simdgroup;
  int row = int(thread_position_in_grid.x) / 32;
  if (row < (heads + k_shape[1]) * nodes) {
    auto x = q;
    auto norm = q_norm;
    auto strides = q_strides;
    bool is_key = row >= heads * nodes;
    if (is_key) {
      x = k;
      norm = k_norm;
      strides = k_strides;
      row -= heads * nodes;
    }
    int node = row % nodes;
    long begin = row / nodes * long(strides[1]) + node * long(strides[2]), step = strides[3];
    float inverse = 1.0f;
    if (NORM) {
      float squares = 0.0f;
      for (int column = lane; column < width; column += 32) {
        float value = x[begin + column * step];
        squares = fma(value, value, squares);
      }
      inverse = 1.0f / sqrt(simd_sum(squares) / float(width) + eps[is_key ? 1 : 0]);
    }
    for (int column = lane; column < width; column += 32) {
      float own = x[begin + column * step];
      own = NORM ? float(T(float(norm[column]) * float(T(own * inverse)))) : own;
      if (column < DIMS) {
        bool second = BY_TWO ? column % 2 == 1 : column >= DIMS / 2;
        int apart = BY_TWO ? 1 : DIMS / 2, other = second ? column - apart : column + apart;
        float pair = x[begin + other * step];
        pair = NORM ? float(T(float(norm[other]) * float(T(pair * inverse)))) : pair;
        long at = node * long(table_strides[0]);
        float cosine = table[at + (second ? other : column) * long(table_strides[1])];
        float sine = table[at + (second ? column : other) * long(table_strides[1])];
        own = second ? fma(pair, sine, own * cosine) : fma(-pair, sine, own * cosine);
      }
      if (is_key) {
        turned_k[long(row) * width + column] = T(own);
      } else {
        turned_q[long(row) * width + column] = T(own);
      }
    }
  }
""",
)


def _kernel(
    queries: Float[mx.array, "1 H N D"],
    keys: Float[mx.array, "1 G N D"],
    table: Float[mx.array, "N D"],
    dims: int,
    by_two: bool,
    norms: tuple[Norm, Norm] | None,
) -> Pair:
    (_, heads, nodes, _), dtype = queries.shape, queries.dtype
    threads = SIMDGROUPS * SIMD_WIDTH
    groups = -(-(heads + keys.shape[1]) * nodes // SIMDGROUPS)
    weights = [table, table] if norms is None else [norm.weight for norm in norms]
    eps = mx.array([0.0, 0.0] if norms is None else [norm.eps for norm in norms], mx.float32)
    template = [("T", dtype), ("DIMS", dims), ("BY_TWO", by_two), ("NORM", norms is not None)]
    turned = PROGRAM(
        [queries, keys, table, *weights, eps],
        template=template,
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[queries.shape, keys.shape],
        output_dtypes=[dtype, dtype],
    )
    return turned[0], turned[1]


def _twin(
    queries: Float[mx.array, "1 H N D"],
    keys: Float[mx.array, "1 G N D"],
    table: Float[mx.array, "N D"],
    dims: int,
    by_two: bool,
    norms: tuple[Norm, Norm] | None,
) -> Pair:
    if norms is not None:
        queries, keys = (
            mx.fast.rms_norm(x, *norm) for x, norm in zip((queries, keys), norms, strict=True)
        )
    return (
        tree_rope.twin(queries, table, dims, by_two),
        tree_rope.twin(keys, table, dims, by_two),
    )


def _takes(
    queries: mx.array,
    keys: mx.array,
    table: mx.array,
    dims: int,
    by_two: bool,
    norms: tuple[Norm, Norm] | None,
) -> bool:
    weights = [] if norms is None else [norm.weight for norm in norms]
    same = all(x.dtype == queries.dtype for x in (keys, *weights))
    return same and all(x.size >= LEAST for x in (queries, keys, *weights))


def _differ(case: Case, found: Pair, expected: Pair) -> str:
    """Say where rotations differ: a norm's sum, in another order, may round a value otherwise."""
    most = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[expected[0].dtype]
    most *= 1 if case.args[-1] is None else 3
    off = max(largest_difference(*pair) for pair in zip(found, expected, strict=True))
    return "" if off <= most else f"the rotation is off by {off:.3g} at {case.name}"


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        groups, share, nodes = (int(random.integers(1, most)) for most in (4, 4, 17))
        width = int(random.choice([8, 16, 64, 80, 128]))
        dims = width if random.random() < 0.7 else 2 * int(random.integers(1, width // 2 + 1))
        dtype = [mx.float32, mx.float16, mx.bfloat16][random.integers(3)]
        heads = groups * share
        # Queries and keys lie side by side, as a joined product leaves them.
        values = random.normal(size=(nodes, (heads + 2 * groups) * width)).astype(np.float32)
        joined = mx.array(values).astype(dtype).reshape(1, nodes, -1, width).swapaxes(1, 2)
        mx.eval(joined)
        norms = None
        if random.random() < 0.5:
            weights = mx.array(random.normal(size=(2, width)).astype(np.float32)).astype(dtype)
            norms = (Norm(weights[0], 1e-6), Norm(weights[1], 1e-3))
        table = mx.array(random.uniform(-1, 1, size=(nodes, width)).astype(np.float32))
        by_two = bool(random.integers(2))
        word = "no norm" if norms is None else "norms"
        name = f"{heads} and {groups} heads, {nodes} nodes, {dims} of {width}, {word}, {dtype}"
        pair = joined[:, :heads], joined[:, heads : heads + groups]
        yield Case(name, (*pair, table, dims, by_two, norms), {})


tree_turns = Operation("tree_turns", _kernel, _twin, _cases, _differ, _takes)
"""Return queries and keys rotated by a table, computed in float32.

Args:
    queries: Of the nodes, as they lie.
    keys: Likewise.
    table: Cosine and sine of every node's pairs; further columns are not looked at.
    dims: The first so many values of a head are rotated.
    by_two: Whether neighbours are a pair, and not the values of two halves.
    norms: Of the heads of queries and of keys, before; None for none.
"""
