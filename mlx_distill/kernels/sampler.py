"""One draw per row of logits: filters, temperature, noise and the best, in one dispatch.

A threadgroup takes a row and reads it a dozen times from its cache. Nothing is sorted: a filter's
border is found by counting, or weighing, what lies above 15 guesses at once, which leaves a
sixteenth of the numbers it may be; float32 is exhausted after 8 such passes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from mlx_distill import arrays
from mlx_distill.core.filters import ROUNDING
from mlx_distill.core.sampling import Sampling, normalised, sample_fast, shaped_logits
from mlx_distill.kernels.choice import Operation, chosen
from mlx_distill.kernels.comparing_draws import cases, draws_differ
from mlx_distill.kernels.noise import Keyed, Noise
from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST = 512  # threads: each holds so many numbers that a GPU has no room for more of them


class Drawn(NamedTuple):
    """What was drawn from each row of logits.

    Args:
        tokens: The draws.
        log_probs: Their log-probabilities under the law that they were drawn from.
        log_sum_exps: Of the logits as they are.
        greatest: The largest logit; no number where any is none, and the draw then means nothing.
        certain: Whether float32 leaves no doubt which tokens the filters keep; None if there are
            no filters.
    """

    tokens: Int[mx.array, " N"]
    log_probs: Float[mx.array, " N"]
    log_sum_exps: Float[mx.array, " N"]
    greatest: Float[mx.array, " N"]
    certain: Bool[mx.array, " N"] | None


FUNCTIONS = """
#define GUESSES 15

struct Place {
  uint self, lane, simdgroup, simdgroups, threads;
};

// A logit as mlx-lm draws from it: half precision is normalised, which rounds; float32 is not.
template <typename T>
FUNCTION float normal(float logit, float shift) {
  return float(T(logit - float(T(shift))));
}
template <>
FUNCTION float normal<float>(float logit, float shift) {
  return logit;
}

// Sums of GUESSES numbers over a threadgroup at once.
FUNCTION void group_sums(PRIVATE_ARG(float) sums, SHARED_ARG(float) table, Place at) {
  for (uint guess = 0; guess < GUESSES; guess++) {
    sums[guess] = simd_sum(sums[guess]);
  }
  barrier();
  if (at.lane == 0) {
    for (uint guess = 0; guess < GUESSES; guess++) {
      table[at.simdgroup * GUESSES + guess] = sums[guess];
    }
  }
  barrier();
  for (uint guess = 0; guess < GUESSES; guess++) {
    sums[guess] = 0.0f;  // in one order for all, who go on by these sums
    for (uint other = 0; other < at.simdgroups; other++) {
      sums[guess] += float(table[other * GUESSES + guess]);
    }
  }
}

// The least number such that less than the border lies above it: probability, or how many tokens.
template <typename T, typename Row>
FUNCTION uint border_of(
    Row row, uint count, float shift, float best, bool weigh, float border,
    SHARED_ARG(float) table, Place at) {
  uint low = ordered(-infinity()), high = ordered(best);
  while (high - low > 1) {
    uint step = (high - low + GUESSES) / (GUESSES + 1);
    float sums[GUESSES];
    for (uint guess = 0; guess < GUESSES; guess++) {
      sums[guess] = 0.0f;
    }
    for (uint i = at.self; i < count; i += at.threads) {
      float value = normal<T>(float(row[i]), shift);
      float weight = weigh ? exp(value - best) : 1.0f;
      uint rank = ordered(value);
      for (uint guess = 0; guess < GUESSES; guess++) {
        sums[guess] += rank > low + step * (guess + 1) ? weight : 0.0f;
      }
    }
    group_sums(sums, table, at);
    uint first = 0;  // how many guesses are too low
    for (uint guess = 0; guess < GUESSES; guess++) {
      first += sums[guess] >= border ? 1 : 0;
    }
    uint above = low + step * (first + 1);
    high = first == GUESSES || above > high ? high : above;
    low += step * first;
  }
  return high;
}

// The noise of a token, as mx.random.gumbel makes it of a row's key: Salmon et al. 2011, threefry.
FUNCTION uint rolled(uint bits, uint by) {
  return bits << by | bits >> (32 - by);
}
FUNCTION float gumbel(uint key, uint second, uint token, uint count) {
  uint most = (count + 1) / 2, pair = token < most ? token : token - most;
  uint keys[3] = {key, second, key ^ second ^ 0x1bd11bdau};
  bool dropped = count % 2 == 1 && pair == most - 1;
  uint x = pair + keys[0], y = (dropped ? 0 : pair + most) + keys[1];
  for (uint turn = 0; turn < 5; turn++) {
    for (uint part = 0; part < 4; part++) {
      uint even = part == 0 ? 13 : part == 1 ? 15 : part == 2 ? 26 : 6;
      uint odd = part == 0 ? 17 : part == 1 ? 29 : part == 2 ? 16 : 24;
      x += y;
      y = rolled(y, turn % 2 == 0 ? even : odd) ^ x;
    }
    x += keys[(turn + 1) % 3];
    y += keys[(turn + 2) % 3] + turn + 1;
  }
  float uniform = min(float(token < most ? x : y) / 4294967296.0f, 0.99999994f);
  return -log(-log(uniform));
}
"""

BODY = """
  SHARED(float, table, 32 * GUESSES);
  SHARED(uint, numbers, 32);
  uint row_number = threadgroup_position_in_grid.y, count = logits_shape[1];
  Place at;
  at.self = thread_index_in_threadgroup;
  at.lane = thread_index_in_simdgroup;
  at.simdgroup = simdgroup_index_in_threadgroup;
  at.threads = threads_per_threadgroup.x;
  at.simdgroups = at.threads / 32;
  auto row = logits + long(row_number) * long(logits_strides[0]);
  float temperature_inverse = laws[0], top_p = laws[1], log_min_p = laws[2], rounding = laws[3];
  uint top_k = settings[0];
  bool greedy = settings[1] == 0, filters = settings[2] != 0, keyed = settings[3] != 0;
  uint place = places[row_number];

  float greatest = -infinity();
  uint wrong = 0;
  for (uint i = at.self; i < count; i += at.threads) {
    float logit = float(row[i]);
    wrong += isnan(logit) ? 1 : 0;
    greatest = max(greatest, isnan(logit) ? -infinity() : logit);
  }
  greatest = group_max(greatest, table, at.lane, at.simdgroup, at.simdgroups);
  wrong = group_sum(wrong, numbers, at.lane, at.simdgroup, at.simdgroups);
  float base = greatest > -infinity() ? greatest : 0.0f;
  float sum = 0.0f;
  for (uint i = at.self; i < count; i += at.threads) {
    float logit = float(row[i]);
    sum += isnan(logit) ? 0.0f : exp(logit - base);
  }
  sum = group_sum(sum, table, at.lane, at.simdgroup, at.simdgroups);
  float shift = base + log(sum);
  float best = normal<T>(greatest, shift);

  uint least = ordered(-infinity());
  bool sure = true;
  if (filters && wrong == 0 && greatest > -infinity()) {
    float total = 0.0f;
    for (uint i = at.self; i < count; i += at.threads) {
      total += exp(normal<T>(float(row[i]), shift) - best);
    }
    total = group_sum(total, table, at.lane, at.simdgroup, at.simdgroups);
    float border = max(top_p * total, 1e-30f);
    uint by_mass = least;
    if (top_p < 1.0f) {
      by_mass = border_of<T>(row, count, shift, best, true, border, table, at);
      least = by_mass;
    }
    if (top_k > 0 && top_k < count) {
      uint by_count = border_of<T>(row, count, shift, best, false, float(top_k), table, at);
      least = max(least, by_count);
    }
    float bound = best + log_min_p;
    if (log_min_p > -infinity()) {
      // The least number that is not below the bound; a zero may have a sign.
      least = max(least, min(ordered(bound), ordered(best)));
    }
    float sums[GUESSES];
    for (uint guess = 0; guess < GUESSES; guess++) {
      sums[guess] = 0.0f;
    }
    for (uint i = at.self; i < count; i += at.threads) {
      float value = normal<T>(float(row[i]), shift);
      uint rank = ordered(value);
      float weight = exp(value - best);
      sums[0] += rank > by_mass ? weight : 0.0f;
      sums[1] += rank >= by_mass ? weight : 0.0f;
      sums[2] += rank >= least ? 1.0f : 0.0f;
      float doubt = rounding * max(1.0f, max(value, -value));
      float off = value - bound;
      bool near = max(off, -off) <= doubt && value < best && value > -infinity();
      sums[3] += near ? 1.0f : 0.0f;
    }
    group_sums(sums, table, at);
    if (top_p < 1.0f && by_mass < ordered(best)) {
      float above = sums[0] - border;
      sure = max(above, -above) > rounding * total;
    }
    if (top_p < 1.0f && sums[1] < total) {
      float with_last = sums[1] - border;
      sure = sure && max(with_last, -with_last) > rounding * total;
    }
    if (top_k > 0 && top_k < count && least > ordered(-infinity())) {
      sure = sure && sums[2] <= float(top_k);
    }
    sure = sure && (log_min_p == -infinity() || sums[3] == 0.0f);
  }

  float mine = -infinity(), mass = 0.0f;
  uint token = 0xffffffffu;
  for (uint i = at.self; i < count; i += at.threads) {
    float value = normal<T>(float(row[i]), shift);
    bool kept = ordered(value) >= least && value > -infinity();
    if (!kept) {
      continue;
    }
    float shaped = greedy ? value : (filters ? value - best : value) * temperature_inverse;
    mass += exp(shaped - (greedy ? best : (filters ? 0.0f : best) * temperature_inverse));
    if (!greedy) {
      shaped += keyed
          ? gumbel(keys[0], keys[1] + uint(settings[4]) + place, i, count)
          : float(noise[long(place) * long(noise_strides[0]) + long(i)]);
    }
    if (shaped > mine) {
      mine = shaped;
      token = i;
    }
  }
  mass = group_sum(mass, table, at.lane, at.simdgroup, at.simdgroups);
  float most = group_max(mine, table, at.lane, at.simdgroup, at.simdgroups);
  uint candidate = mine == most && token < count ? token : 0xffffffffu;
  token = group_min(candidate, numbers, at.lane, at.simdgroup, at.simdgroups);
  if (at.self == 0) {
    // Where nothing can be drawn, the first token stands for it.
    bool none = wrong > 0 || token >= count;
    uint chosen = none ? 0 : token;
    float value = normal<T>(float(row[chosen]), shift);
    tokens[row_number] = int(chosen);
    float scale = greedy ? 1.0f : temperature_inverse;
    float nothing = float_of(0x7fc00000u);
    log_probs[row_number] = none ? nothing : (value - best) * scale - log(mass);
    log_sum_exps[row_number] = wrong > 0 ? nothing : shift;
    greatests[row_number] = wrong > 0 ? nothing : greatest;
    certain[row_number] = sure;
  }
"""

PROGRAM = Program(
    name="sampler",
    inputs=("logits", "noise", "places", "keys", "laws", "settings"),
    outputs=("tokens", "log_probs", "log_sum_exps", "greatests", "certain"),
    functions=FUNCTIONS,
    body=BODY,
    any_layout=True,
)


def _kernel(
    logits: Float[mx.array, "N V"],
    sampling: Sampling,
    noise: Noise | None = None,
    places: Int[mx.array, " N"] | None = None,
) -> Drawn:
    rows, vocab_size = logits.shape
    filters = sampling.filters(vocab_size) and sampling.temperature > 0
    keyed = isinstance(noise, Keyed)
    min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
    inverse = 1 / sampling.temperature if sampling.temperature else 1.0
    flags = [sampling.top_k, sampling.temperature > 0, filters, keyed]
    threads = min(MOST, -(-vocab_size // SIMD_WIDTH) * SIMD_WIDTH)
    tokens, log_probs, log_sum_exps, greatest, certain = PROGRAM(
        [
            logits,
            mx.zeros((1, 1)) if noise is None or isinstance(noise, Keyed) else noise,
            mx.arange(rows) if places is None else places,
            noise.key if isinstance(noise, Keyed) else mx.array([0, 0], mx.uint32),
            mx.array([inverse, sampling.top_p, min_p, ROUNDING]),
            mx.array([*map(int, flags), noise.start if isinstance(noise, Keyed) else 0]),
        ],
        template=[("T", logits.dtype)],
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,)] * 5,
        output_dtypes=[mx.int32, mx.float32, mx.float32, mx.float32, mx.bool_],
    )
    return Drawn(tokens, log_probs, log_sum_exps, greatest, certain if filters else None)


def _twin(
    logits: Float[mx.array, "N V"],
    sampling: Sampling,
    noise: Noise | None = None,
    places: Int[mx.array, " N"] | None = None,
) -> Drawn:
    tokens, certain = _tokens(logits, sampling, noise, places)
    # Of what follows, only what is asked for is ever computed.
    shaped = normalised(logits)
    shaped = shaped_logits(shaped, sampling) if sampling.temperature else shaped
    log_probs = mx.take_along_axis(arrays.log_probs(shaped), tokens[:, None], axis=-1)[:, 0]
    sums = arrays.log_sum_exp(logits.astype(mx.float32))[:, 0]
    return Drawn(tokens, log_probs, sums, logits.max(axis=-1), certain)


def _tokens(
    logits: Float[mx.array, "N V"],
    sampling: Sampling,
    noise: Noise | None,
    places: Int[mx.array, " N"] | None,
) -> tuple[Int[mx.array, " N"], Bool[mx.array, " N"] | None]:
    if isinstance(noise, Keyed):
        where = mx.arange(logits.shape[0]) if places is None else places
        noise = noise.rows(where, logits.shape[-1])
    elif noise is not None and places is not None:
        noise = noise[places]
    return sample_fast(logits, sampling, noise)


def _takes(
    logits: mx.array,
    sampling: Sampling,
    noise: Noise | None = None,
    places: mx.array | None = None,
) -> bool:
    """Return whether counts of tokens are exact in float32, and the types are known."""
    known = logits.dtype in (mx.float32, mx.float16, mx.bfloat16)
    return known and logits.shape[-1] < 2**24


draw = Operation("sampler", _kernel, _twin, cases, draws_differ, _takes)
"""Return a token per row of logits, as ``core.sampling.sample_fast`` draws it: see ``Drawn``.

Args:
    logits: Not normalised; the tokens of a row lie together.
    sampling: The law.
    noise: Gumbel noise, a row for every place; None at temperature 0.
    places: Which row of noise each row of logits takes; None if it is the same one.
"""


DrawTokens: TypeAlias = Callable[..., tuple[mx.array, mx.array, mx.array | None]]


def draw_tokens(
    logits: Float[mx.array, "N V"],
    sampling: Sampling,
    noise: Noise | None = None,
    places: Int[mx.array, " N"] | None = None,
) -> tuple[Int[mx.array, " N"], Float[mx.array, " N"], Bool[mx.array, " N"] | None]:
    """Return the tokens, the greatest logits and what is certain, as ``draw`` does; no more."""
    return chosen_draw()(logits, sampling, noise, places)


def chosen_draw() -> DrawTokens:
    """Return what ``draw_tokens`` does from now on: for many draws, it is chosen once."""
    return _draw_by_choice if chosen(draw.name) else _draw_by_twin


def _draw_by_choice(
    logits: mx.array, sampling: Sampling, noise: Noise | None, places: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    drawn = draw(logits, sampling, noise, places)
    return drawn.tokens, drawn.greatest, drawn.certain


def _draw_by_twin(
    logits: mx.array, sampling: Sampling, noise: Noise | None, places: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    tokens, certain = _tokens(logits, sampling, noise, places)
    return tokens, logits.max(axis=-1), certain
