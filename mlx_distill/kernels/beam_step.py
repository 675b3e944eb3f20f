"""One step of a beam search: the best continuations of all beams, in two dispatches.

    logits of W beams, V columns  ->  of every beam its W best  ->  the W best of these W x W

A threadgroup takes a beam. Every thread knows the best of its own columns; the best of those is
taken W times, and only the thread that had it looks at its columns again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Integer

from mlx_distill.arrays import log_sum_exp
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import TOLERANCES, largest_difference
from mlx_distill.kernels.program import MOST_THREADS, SIMD_WIDTH, Program

WIDEST = 32  # beams; all their candidates fit into one threadgroup


class Best(NamedTuple):
    """The best continuations of all beams.

    Args:
        places: Which they are, beam times columns plus column; the twin's are in no order.
        scores: Of the paths that end with them.
        shift: What is still to be taken from the scores, wherever they are used; None for nothing.
            One beam's scores differ by that alone, and where they are used it costs nothing.
    """

    places: Integer[mx.array, " K"]
    scores: Float[mx.array, " K"]
    shift: Float[mx.array, " 1"] | None = None


OF_A_BEAM = Program(
    name="beam_candidates",
    inputs=("logits", "above"),
    outputs=("places", "scores"),
    body="""
  SHARED(float, table, 32);
  SHARED(uint, numbers, 32);
  uint beam = threadgroup_position_in_grid.y, count = logits_shape[1], width = WIDTH;
  uint self = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  auto row = logits + long(beam) * count;
  float mine = -infinity();
  uint column = 0xffffffffu;
  for (uint i = self; i < count; i += threads) {
    float logit = float(row[i]);
    if (logit > mine || column == 0xffffffffu) {
      mine = logit;
      column = i;
    }
  }
  float best = group_max(mine, table, lane, simdgroup, threads / 32);
  float base = best > -infinity() ? best : 0.0f;
  float sum = 0.0f;
  for (uint i = self; i < count; i += threads) {
    sum += exp(float(row[i]) - base);
  }
  sum = group_sum(sum, table, lane, simdgroup, threads / 32);
  float shift = float(above[beam]) - (base + log(sum));
  for (uint found = 0; found < width; found++) {
    best = group_max(mine, table, lane, simdgroup, threads / 32);
    uint candidate = mine == best ? column : 0xffffffffu;
    uint taken = group_min(candidate, numbers, lane, simdgroup, threads / 32);
    if (self == 0) {
      places[beam * width + found] = beam * count + min(taken, count - 1);
      scores[beam * width + found] = best > -infinity() ? best + shift : best;
    }
    if (taken == column && taken < count) {
      // The next of the own columns: lower than the one that is taken, or equal and behind it.
      float next = -infinity();
      uint at = 0xffffffffu;
      for (uint i = self; i < count; i += threads) {
        float logit = float(row[i]);
        bool left = logit < best || (logit == best && i > taken);
        if (left && (at == 0xffffffffu || logit > next)) {
          next = logit;
          at = i;
        }
      }
      mine = next;
      column = at;
    }
  }
""",
)

OF_ALL = Program(
    name="beam_best",
    inputs=("candidates", "values"),
    outputs=("places", "scores"),
    # Every candidate counts how many are better; of equals those that come first are.
    body="""
  SHARED(float, table, 1024);
  SHARED(uint, numbers, 1024);
  uint self = thread_index_in_threadgroup, count = candidates_shape[0];
  if (self < count) {
    table[self] = float(values[self]);
    numbers[self] = uint(candidates[self]);
  }
  barrier();
  if (self < count) {
    float own = table[self];
    uint place = numbers[self], better = 0;
    for (uint other = 0; other < count; other++) {
      float value = table[other];
      uint at = numbers[other];
      bool first = at < place || (at == place && other < self);
      better += value > own || (value == own && first) ? 1 : 0;
    }
    if (better < WIDTH) {
      places[better] = place;
      scores[better] = own;
    }
  }
""",
)


def _kernel(
    logits: Float[mx.array, "W V"], above: Float[mx.array, "W 1"] | None, width: int
) -> Best:
    above = mx.zeros((logits.shape[0], 1)) if above is None else above
    beams, vocab_size = logits.shape
    threads = min(MOST_THREADS, -(-vocab_size // SIMD_WIDTH) * SIMD_WIDTH)
    template = [("WIDTH", width)]
    places, scores = OF_A_BEAM(
        [logits, above],
        template=template,
        grid=(threads, beams, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(beams * width,)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )
    if beams == 1:  # they are in order
        return Best(places, scores)
    threads = -(-beams * width // SIMD_WIDTH) * SIMD_WIDTH
    places, scores = OF_ALL(
        [places, scores],
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(width,)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )
    return Best(places, scores)


def _twin(logits: Float[mx.array, "W V"], above: Float[mx.array, "W 1"] | None, width: int) -> Best:
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    if above is None:
        flat = logits.reshape(-1)
        places = top(flat, width)
        return Best(places, flat[places], total.reshape(-1))
    flat = (logits - total + above).reshape(-1)
    places = top(flat, width)
    return Best(places, flat[places])


def top(scores: Float[mx.array, " V"], count: int) -> Integer[mx.array, " K"]:
    """Return the indices of the ``count`` largest scores, in no order."""
    if count == scores.size:
        return mx.arange(count).astype(mx.uint32)
    order = mx.argpartition(scores, kth=scores.size - count)
    return order[scores.size - count :]


def _takes(logits: mx.array, above: mx.array | None, width: int) -> bool:
    return max(width, logits.shape[0]) <= WIDEST and width <= logits.shape[1]


# ---------------------------------------------------------------------------------------- cases

SIZES = (1, 31, 97, 1000, 8192, 32_000)
LARGE = (128_256, 151_936, 262_144)
WIDTHS = (1, 4, 8, 32)  # each is compiled


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        size = int(random.choice(LARGE if random.random() < 0.01 else SIZES))
        beams = int(random.choice([1, 2, 4, 8, 32] if size <= 1000 else [1, 2, 4]))
        width = min(size, int(random.choice(WIDTHS)))
        kind = str(random.choice(["normal", "ties", "flat", "barred", "one-hot"]))
        logits = random.normal(size=(beams, size)).astype(np.float32) * 4
        if kind == "ties":
            logits = np.round(logits / 2)
        elif kind == "flat":
            logits[:] = 1
        elif kind == "barred":
            logits[random.random(logits.shape) < 0.7] = -np.inf
        elif kind == "one-hot":
            logits[:] = -np.inf
            logits[np.arange(beams), random.integers(0, size, beams)] = 0
        above = random.choice([0, -1, -2.5, -30], (beams, 1)).astype(np.float32)
        name = f"{kind}, {beams} x {size}, the best {width}"
        scores = None if beams == 1 and random.random() < 0.5 else mx.array(above)
        yield Case(name, (mx.array(logits), scores, width), {})


def _differ(case: Case, found: Best, expected: Best) -> str:
    """Return in what the best differ: scores to rounding, order and ties exactly."""
    logits, above, width = case.args
    places, scores = np.array(found.places).astype(np.int64), np.array(found.scores)
    # On a CPU the twin's sums of wide rows are off by more than that.
    above = mx.zeros(1) if above is None else above
    flat = (logits - log_sum_exp(logits) + above).reshape(-1)
    ranked = mx.sort(mx.where(mx.isnan(flat), mx.inf, -flat))[:width]
    off = largest_difference(-found.scores, ranked)
    if expected.places.size != width or expected.scores.size != width:
        return f"the twin does not return {width} at {case.name}"
    if off > TOLERANCES[mx.float32]:
        return f"scores are off by {off:.3g} at {case.name}"
    possible = scores > -np.inf
    order = np.lexsort((places[possible], -scores[possible]))
    if not (order == np.arange(order.size)).all() or np.unique(places[possible]).size < order.size:
        return f"the best are in no order at {case.name}"
    # Of a beam's equal columns, none is left out before one that is taken.
    beams, columns = np.divmod(places[possible], logits.shape[1])
    for beam in np.unique(beams):
        row, own = np.array(logits[int(beam)]), columns[beams == beam]
        least = row[own].min()
        ties = np.flatnonzero(row == least)
        if not set(ties[ties < own[row[own] == least].max()]) <= set(own):
            return f"ties are not stable at {case.name}"
    return ""


beam_step = Operation("beam_step", _kernel, _twin, _cases, _differ, _takes)
"""Return the best continuations of all beams: see ``Best``.

Args:
    logits: Of each beam, not normalised, in float32.
    above: The scores of the beams, (W, 1); None for one beam, which has none yet.
    width: How many to take.
"""
