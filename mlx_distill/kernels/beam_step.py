"""One step of a beam search: the best continuations of all beams, in two dispatches.

    logits of W beams, V columns  ->  of every beam its W best  ->  the W best of these W x W

A threadgroup takes a beam. Every thread knows the best of its own columns; the best of those is
taken W times, and only the thread that had it looks at its columns again.

What a path costs, the negative of its log-probability, is a whole number of millionths of a nat
(of 2 ** -20). So a continuation is one number of 64 bits, the smaller the likelier, which sorts
with all that is to be known of it:

    cost 32 bits | beam 16 bits | token 16 bits         tokens of wide vocabularies: 12 and 20 bits

and where the widths are 16, tokens and beams are found by looking at the memory in another way.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Integer, UInt32

from mlx_distill.arrays import log_sum_exp
from mlx_distill.kernels import exponentials
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import TOLERANCES
from mlx_distill.kernels.program import MOST_THREADS, SIMD_WIDTH, Program

WIDEST = 32  # beams; all their candidates fit into one threadgroup
NATS = 2**20  # of the cost's unit in a nat
# Nats; what costs more, or is not a number, is as good as impossible.
MOST_NATS = 2047
MOST_COST = MOST_NATS * NATS
HALF = 16


def token_bits(num_tokens: int) -> int:
    """Return how many bits a token takes in a word; few widths, for each is a kernel of its own."""
    return HALF if num_tokens <= 2**HALF else max(20, (num_tokens - 1).bit_length())


def tokens_of(words: UInt32[mx.array, "K 2"], bits: int) -> Integer[mx.array, " K"]:
    """Return the tokens that continuations end with."""
    return words.view(mx.uint16)[:, 0] if bits == HALF else words[:, 0] & (2**bits - 1)


def beams_of(words: UInt32[mx.array, "K 2"], bits: int) -> Integer[mx.array, " K"]:
    """Return the beams that are continued."""
    return words.view(mx.uint16)[:, 1] if bits == HALF else words[:, 0] >> bits


def costs_of(words: UInt32[mx.array, "K 2"]) -> UInt32[mx.array, " K"]:
    """Return what the paths cost."""
    return words[:, 1]


OF_A_BEAM = Program(
    name="beam_candidates",
    inputs=("logits", "above", "tokens"),
    outputs=("words",),
    body="""
  SHARED(float, table, 32);
  SHARED(uint, numbers, 32);
  uint beam = threadgroup_position_in_grid.y, count = logits_shape[1], width = WIDTH;
  uint self = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  auto row = logits + long(beam) * count;
  auto own = tokens + (tokens_shape[0] > 1 ? long(beam) * count : 0);
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
  float total = base + log(sum);
  for (uint found = 0; found < width; found++) {
    best = group_max(mine, table, lane, simdgroup, threads / 32);
    uint candidate = mine == best ? column : 0xffffffffu;
    uint taken = group_min(candidate, numbers, lane, simdgroup, threads / 32);
    if (self == 0) {
      float lost = total - best;
      uint cost = lost < float(MOST_NATS) ? uint(max(lost, 0.0f) * float(NATS)) : MOST_COST;
      uint place = 2 * (beam * width + found);
      words[place] = (beam << TOKEN_BITS) + uint(own[min(taken, count - 1)]);
      words[place + 1] = min(uint(above[beam]) + cost, uint(MOST_COST));
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
    inputs=("candidates",),
    outputs=("words",),
    # Every candidate counts how many are better; of equals those that come first are.
    body="""
  SHARED(uint, costs, 1024);
  SHARED(uint, names, 1024);
  uint self = thread_index_in_threadgroup, count = candidates_shape[0];
  if (self < count) {
    names[self] = candidates[2 * self];
    costs[self] = candidates[2 * self + 1];
  }
  barrier();
  if (self < count) {
    uint cost = costs[self], name = names[self], better = 0;
    for (uint other = 0; other < count; other++) {
      uint value = costs[other], at = names[other];
      bool first = at < name || (at == name && other < self);
      better += value < cost || (value == cost && first) ? 1 : 0;
    }
    if (better < WIDTH) {
      words[2 * better] = name;
      words[2 * better + 1] = cost;
    }
  }
""",
)


def _kernel(
    logits: Float[mx.array, "W V"],
    above: UInt32[mx.array, "W 1"] | None,
    tokens: Integer[mx.array, "_ V"],
    width: int,
    bits: int,
) -> UInt32[mx.array, "K 2"]:
    beams, num_columns = logits.shape
    above = mx.zeros((beams, 1), mx.uint32) if above is None else above
    threads = min(MOST_THREADS, -(-num_columns // SIMD_WIDTH) * SIMD_WIDTH)
    numbers = {"MOST_NATS": MOST_NATS, "NATS": NATS, "MOST_COST": MOST_COST, "TOKEN_BITS": bits}
    (words,) = OF_A_BEAM(
        [logits, above, tokens],
        template=[("WIDTH", width), *numbers.items()],
        grid=(threads, beams, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(beams * width, 2)],
        output_dtypes=[mx.uint32],
    )
    if beams == 1:  # they are in order
        return words
    threads = -(-beams * width // SIMD_WIDTH) * SIMD_WIDTH
    (words,) = OF_ALL(
        [words],
        template=[("WIDTH", width)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(width, 2)],
        output_dtypes=[mx.uint32],
    )
    return words


def _twin(
    logits: Float[mx.array, "W V"],
    above: UInt32[mx.array, "W 1"] | None,
    tokens: Integer[mx.array, "_ V"],
    width: int,
    bits: int,
) -> UInt32[mx.array, "K 2"]:
    total = exponentials.log_sum_exp(logits)
    return best_of(logits, total, above, tokens, width, bits)


def best_of(
    logits: Float[mx.array, "W C"],
    total: Float[mx.array, "W 1"],
    above: UInt32[mx.array, "W 1"] | None,
    tokens: Integer[mx.array, "_ C"],
    width: int,
    bits: int,
) -> UInt32[mx.array, "K 2"]:
    """Return the best continuations, of logits whose sum over all columns is known.

    Args:
        logits: Of some columns or all.
        total: Logarithm of the sum of the exponentials, of all.
        above: As ``beam_step`` has it, and what follows.
        tokens: What the columns stand for.
        width: How many to take.
        bits: Of a token.
    """
    lost = mx.maximum(total - logits, 0)
    cost = (mx.where(lost < MOST_NATS, lost, MOST_NATS) * NATS).astype(mx.int64)
    if above is not None:
        cost = mx.minimum(cost + above.astype(mx.int64), MOST_COST)
    beams = mx.array(np.arange(logits.shape[0])[:, None] << bits)
    words = (cost * mx.array(2**32, mx.int64) + (tokens.astype(mx.int64) + beams)).reshape(-1)
    if width < words.size:
        words = mx.partition(words, kth=width - 1)[:width]
    return words.view(mx.uint32).reshape(width, 2)


def _takes(
    logits: mx.array, above: mx.array | None, tokens: mx.array, width: int, bits: int
) -> bool:
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
        nats = random.choice([0, 1, 2.5, 30, MOST_NATS - 1], (beams, 1))
        above = mx.array((nats * NATS).astype(np.uint32))
        first, listed = int(random.integers(0, 2**HALF)), bool(random.random() < 0.3)
        bits = token_bits(first + size)
        tokens = first + np.arange(size)[None]
        if listed:  # in another order for every beam
            tokens = random.permuted(np.repeat(tokens, beams, axis=0), axis=1)
        name = f"{kind}, {beams} x {size}, the best {width}{', listed' if listed else ''}"
        known = None if beams == 1 and random.random() < 0.5 else above
        args = (mx.array(logits), known, mx.array(tokens.astype(np.uint32)), width, bits)
        yield Case(name, args, {})


def _differ(case: Case, found: UInt32[mx.array, "K 2"], expected: UInt32[mx.array, "K 2"]) -> str:
    """Return in what the best differ: costs to rounding, order and ties exactly."""
    logits, above, _, width, _ = case.args
    if expected.shape != (width, 2) or found.shape != (width, 2):
        return f"there are not {width} at {case.name}"
    # On a CPU the twin's sums of wide rows are off by more than rounding.
    lost = np.maximum(np.array(log_sum_exp(logits) - logits), 0)
    lost = np.where(lost < MOST_NATS, lost, MOST_NATS) + (0 if above is None else above / NATS)
    ranked = np.sort(np.minimum(lost, MOST_NATS), axis=None)[:width]
    costs = np.array(costs_of(found)).astype(np.int64)
    off = np.abs(costs / NATS - ranked) / (1 + ranked)
    if off.max() > TOLERANCES[mx.float32]:
        return f"costs are off by {off.max():.3g} at {case.name}"
    possible = costs < MOST_COST
    names = np.array(found[:, 0]).astype(np.int64)
    if (np.diff(costs) < 0).any() or np.unique(names).size < width:
        return f"the best are in no order at {case.name}"
    return _unstable(case, names[possible])


def _unstable(case: Case, names: np.ndarray) -> str:
    """Say where of a beam's equal columns one is left out before one that is taken."""
    logits, _, tokens, _, bits = case.args
    if len(tokens) > 1:  # equal costs of several beams are in the order of tokens
        return ""
    for beam in np.unique(names >> bits):
        row, of_beam = np.array(logits[int(beam)]), names[names >> bits == beam]
        own = np.flatnonzero(np.isin(np.array(tokens[0]), of_beam & (2**bits - 1)))
        least = row[own].min()
        ties = np.flatnonzero(row == least)
        if not set(ties[ties < own[row[own] == least].max()]) <= set(own):
            return f"ties are not stable at {case.name}"
    return ""


beam_step = Operation("beam_step", _kernel, _twin, _cases, _differ, _takes)
"""Return the best continuations of all beams, as words of two: the token and the beam, the cost.

The kernel's are in order, the twin's are in none.

Args:
    logits: Of each beam, not normalised, in float32.
    above: What the beams cost, (W, 1); None for one beam, which costs nothing.
    tokens: What the columns stand for, for all beams or for each.
    width: How many to take.
    bits: Of a token.
"""
