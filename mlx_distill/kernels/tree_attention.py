"""Attention of a tree's nodes over a cache and their ancestors, each cached key read once.

    cached keys  k k k k k   nodes  A B C D     inside, of D   A, B and D
    positions    0 1 2 3 4          5 6 6 7

A group of threads has the rows of one head of keys (all nodes, and all heads of queries that share
it) and 256 positions of the text, 32 at a time: a lane scores one position for some rows, then adds
some columns of the values. Beyond the cached tokens a row's positions are its ancestors, found by
their bits. So a row sums up what a step of plain decoding would, in the same order, whatever the
other nodes are. Longer texts are made of parts of 256 positions, which a second kernel joins in
their order.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float

from mlx_distill.arrays import to_number
from mlx_distill.core.prefix_tree import ancestors
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import largest_difference
from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST_NODES, MOST_ROWS = 16, 128
PART = 256
SIMDGROUPS = 8
MOST_HEAD_BYTES = 512  # of a key: 32 of them lie in a threadgroup's memory

FUNCTIONS = """
// The slot of a row's position: a cached token's, or that of the node's ancestor there; -1 beyond.
FUNCTION int slot_of(int position, int past, uint bits) {
  if (position < past) {
    return position;
  }
  for (int left = position - past; left > 0 && bits; left--) {
    bits &= bits - 1u;  // the ancestors above
  }
  return bits ? past + int(ones_in((bits & (~bits + 1u)) - 1u)) : -1;
}
// A sum whose order is known.
FUNCTION float ordered_sum(float value) {
  for (uint mask = 16; mask; mask /= 2) {
    value += simd_shuffle_xor(value, mask);
  }
  return value;
}
"""
BODY = """
  SHARED(T, tile, 32 * (WIDTH + 1));
  uint lane = thread_index_in_simdgroup, self = thread_index_in_threadgroup;
  int part = simdgroup_index_in_threadgroup;
  int heads = q_shape[1], nodes = q_shape[2], share = heads / k_shape[1], total = k_shape[2];
  int past = total - nodes, rows = nodes * share;
  int group = threadgroup_position_in_grid.x, number = threadgroup_position_in_grid.y;
  float best[ROWS], size[ROWS], sums[ROWS * COLUMNS], score[ROWS];
  long query[ROWS];
  uint own[ROWS];
  for (int i = 0; i < ROWS; i++) {
    int row = part + i * SIMDGROUPS;
    row = row < rows ? row : rows - 1;  // beyond the last, what nobody keeps
    query[i] = (group * share + row / nodes) * long(q_strides[1])
        + row % nodes * long(q_strides[2]);
    own[i] = 0;
    for (int j = 0; j < nodes; j++) {
      bool above = inside[row % nodes * long(inside_strides[0]) + j * long(inside_strides[1])];
      own[i] |= above ? 1u << j : 0u;
    }
    best[i] = -infinity();
    size[i] = 0.0f;
    for (int j = 0; j < COLUMNS; j++) {
      sums[i * COLUMNS + j] = 0.0f;
    }
  }
  long keys = group * long(k_strides[1]), values = group * long(v_strides[1]);
  for (int begin = number * PART; begin < total && begin < (number + 1) * PART; begin += 32) {
    bool cached = begin + 32 <= past;
    if (cached) {
      barrier();
      for (int i = self; i < 32 * WIDTH; i += 32 * SIMDGROUPS) {
        tile[i / WIDTH * (WIDTH + 1) + i % WIDTH] =
            k[keys + (begin + i / WIDTH) * long(k_strides[2]) + i % WIDTH * long(k_strides[3])];
      }
      barrier();
      for (int i = 0; i < ROWS; i++) {
        score[i] = 0.0f;
      }
      for (int d = 0; d < WIDTH; d++) {
        float key = float(T(tile[lane * (WIDTH + 1) + d]));
        for (int i = 0; i < ROWS; i++) {
          score[i] = fma(float(q[query[i] + d * long(q_strides[3])]), key, score[i]);
        }
      }
    } else {
      for (int i = 0; i < ROWS; i++) {
        int slot = slot_of(begin + lane, past, own[i]);
        score[i] = slot < 0 ? -infinity() : 0.0f;
        for (int d = 0; slot >= 0 && d < WIDTH; d++) {
          float key = k[keys + slot * long(k_strides[2]) + d * long(k_strides[3])];
          score[i] = fma(float(q[query[i] + d * long(q_strides[3])]), key, score[i]);
        }
      }
    }
    for (int i = 0; i < ROWS; i++) {
      float scaled = score[i] * scale[0], top = simd_max(scaled);
      top = best[i] < top ? top : best[i];
      float before = best[i] == top ? 1.0f : exp(best[i] - top);
      score[i] = scaled == -infinity() ? 0.0f : exp(scaled - top);
      size[i] = fma(size[i], before, ordered_sum(score[i]));
      best[i] = top;
      for (int j = 0; j < COLUMNS; j++) {
        sums[i * COLUMNS + j] *= before;
      }
    }
    if (cached) {
      barrier();
      for (int i = self; i < 32 * WIDTH; i += 32 * SIMDGROUPS) {
        tile[i / WIDTH * (WIDTH + 1) + i % WIDTH] =
            v[values + (begin + i / WIDTH) * long(v_strides[2]) + i % WIDTH * long(v_strides[3])];
      }
      barrier();
    }
    for (int key = 0; key < 32; key++) {
      for (int i = 0; i < ROWS; i++) {
        float weight = simd_shuffle(score[i], uint(key));
        int slot = cached ? key : slot_of(begin + key, past, own[i]);
        for (int j = 0; slot >= 0 && j < COLUMNS; j++) {
          int column = lane + 32 * j;
          float value = cached ? float(T(tile[slot * (WIDTH + 1) + column]))
              : float(v[values + slot * long(v_strides[2]) + column * long(v_strides[3])]);
          sums[i * COLUMNS + j] = fma(weight, value, sums[i * COLUMNS + j]);
        }
      }
    }
  }
  for (int i = 0; i < ROWS; i++) {
    int row = part + i * SIMDGROUPS;
    if (row < rows) {
      // Token by token, as models go on with it: head by head they would copy it.
      long at = row % nodes * long(heads) + group * share + row / nodes;
      KEEP
    }
  }
"""
WHOLE = """
      for (int j = 0; j < COLUMNS; j++) {
        out[at * WIDTH + lane + 32 * j] = T(sums[i * COLUMNS + j] / size[i]);
      }
"""
IN_PARTS = """
      at += number * long(heads * nodes);
      for (int j = 0; j < COLUMNS; j++) {
        out[at * WIDTH + lane + 32 * j] = sums[i * COLUMNS + j];
      }
      if (lane == 0) {
        state[2 * at] = best[i];
        state[2 * at + 1] = size[i];
      }
"""
INPUTS = ("q", "k", "v", "inside", "scale")
ALONE = Program(
    "tree_attention", INPUTS, ("out",), BODY.replace("KEEP", WHOLE), FUNCTIONS, any_layout=True
)
PARTS = Program(
    "tree_attention_parts",
    INPUTS,
    ("out", "state"),
    BODY.replace("KEEP", IN_PARTS),
    FUNCTIONS,
    any_layout=True,
)
JOIN = Program(
    name="tree_attention_join",
    inputs=("sums", "state"),
    outputs=("out",),
    body="""
  int parts = sums_shape[0], rows = sums_shape[1], width = sums_shape[2];
  int row = threadgroup_position_in_grid.x, column = thread_position_in_threadgroup.x;
  float best = -infinity(), size = 0.0f, sum = 0.0f;
  for (int part = 0; part < parts; part++) {
    long at = part * long(rows) + row;
    float own = state[2 * at], top = best < own ? own : best;
    float before = best == top ? 1.0f : exp(best - top);
    float now = own == -infinity() ? 0.0f : exp(own - top);
    size = fma(size, before, now * state[2 * at + 1]);
    sum = fma(sum, before, now * sums[at * width + column]);
    best = top;
  }
  out[long(row) * width + column] = T(sum / size);
""",
)


def _kernel(
    queries: Float[mx.array, "1 H N D"],
    keys: Float[mx.array, "1 G S D"],
    values: Float[mx.array, "1 G S D"],
    mask: Bool[mx.array, "N S"],
    inside: Bool[mx.array, "N N"],
    scale: float,
) -> Float[mx.array, "1 H N D"]:
    heads, nodes, width = queries.shape[1:]
    groups, total, dtype = keys.shape[1], keys.shape[2], queries.dtype
    rows, parts = heads // groups * nodes, -(-total // PART)
    template: list[tuple[str, Any]] = [("T", dtype), ("WIDTH", width), ("PART", PART)]
    template += [("COLUMNS", width // SIMD_WIDTH), ("SIMDGROUPS", SIMDGROUPS)]
    template += [("ROWS", -(-rows // SIMDGROUPS))]
    inputs = [queries, keys, values, inside, mx.array([scale], mx.float32)]
    threads = SIMDGROUPS * SIMD_WIDTH
    launch: dict[str, Any] = {"template": template, "threadgroup": (threads, 1, 1)}
    launch |= {"grid": (groups * threads, parts, 1)}
    written = (1, nodes, heads, width)
    if parts == 1:
        made = ALONE(inputs, **launch, output_shapes=[written], output_dtypes=[dtype])[0]
        return made.swapaxes(1, 2)
    shapes = [(parts, heads * nodes, width), (parts, heads * nodes, 2)]
    found = PARTS(inputs, **launch, output_shapes=shapes, output_dtypes=[mx.float32] * 2)
    return JOIN(
        found,
        template=[("T", dtype)],
        grid=(heads * nodes * width, 1, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[written],
        output_dtypes=[dtype],
    )[0].swapaxes(1, 2)


def _twin(
    queries: Float[mx.array, "1 H N D"],
    keys: Float[mx.array, "1 G S D"],
    values: Float[mx.array, "1 G S D"],
    mask: Bool[mx.array, "N S"],
    inside: Bool[mx.array, "N N"],
    scale: float,
) -> Float[mx.array, "1 H N D"]:
    attend = mx.fast.scaled_dot_product_attention
    return attend(queries, keys, values, scale=scale, mask=mask)


def _takes(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array,
    inside: mx.array,
    scale: float,
) -> bool:
    _, heads, nodes, width = queries.shape
    same = queries.dtype == keys.dtype == values.dtype and width == keys.shape[3] == values.shape[3]
    rows = heads // keys.shape[1] * nodes
    few = queries.shape[0] == 1 and nodes <= MOST_NODES and rows <= MOST_ROWS
    fits = width % SIMD_WIDTH == 0 and width * queries.dtype.size <= MOST_HEAD_BYTES
    return same and few and fits and heads % keys.shape[1] == 0


def _differ(case: Case, found: mx.array, expected: mx.array) -> str:
    """Say where results differ by more than rounding; weights of a sum are at most 1."""
    queries, keys, values, mask, inside, scale = case.args
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    exact = _twin(queries, keys, values, mask, inside, scale)
    size = max(1.0, to_number(mx.abs(values).max()))
    most = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[expected.dtype]
    off = largest_difference(found, exact.astype(found.dtype)) / size
    return "" if off <= most else f"attention is off by {off:.3g} at {case.name}"


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        groups, share = int(random.integers(1, 4)), int(random.choice([1, 2, 3, 7]))
        nodes = int(random.choice([1, 2, 3, 8, 16]))
        while share * nodes > MOST_ROWS:
            share //= 2
        width = int(random.choice([32, 64, 128]))
        past = int(random.choice([0, 1, 31, 40, 128, 240, 255, 256, 290]))
        dtype = [mx.float32, mx.float16, mx.bfloat16][random.integers(3)]
        links = [0, *(int(random.integers(node)) for node in range(1, nodes))]
        inside = ancestors(mx.array(links, mx.int32), nodes)
        mask = mx.concatenate([mx.ones((nodes, past), mx.bool_), inside], axis=1)
        total, heads = past + nodes, groups * share
        kind = str(random.choice(["normal", "normal", "peaked", "equal"]))
        size = {"normal": 1.0, "peaked": 8.0, "equal": 0.0}[kind]
        q = _normal(random, (1, nodes, heads, width), dtype).swapaxes(1, 2) * size
        # Keys lie in a longer buffer, as a cache's do.
        k, v = (_normal(random, (1, groups, total + 9, width), dtype) for _ in range(2))
        args = (q, k[..., :total, :], v[..., :total, :], mask, inside, width**-0.5)
        name = f"{kind}, {heads} heads of {width} by {groups}, {nodes} after {past}, {dtype}"
        yield Case(name, args, {})


def _normal(random: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(random.normal(size=shape).astype(np.float32)).astype(dtype)


tree_attention = Operation("tree_attention", _kernel, _twin, _cases, _differ, _takes)
"""Return the attention of the nodes of a tree.

Args:
    queries: Of the nodes.
    keys: Cached ones, then those of the nodes.
    values: Likewise.
    mask: Which of them each node attends to: all that are cached, and its ancestors.
    inside: The same of the nodes alone: the ancestors of each, and the node itself.
    scale: Of the scores.
"""
