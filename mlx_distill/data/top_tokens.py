"""A distribution as its most probable tokens and the mass of all others, or as draws."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, UInt32

PART = 256  # values summed at once: in one sum, 70,000 in float32 are off by 1e-4 on a CPU


def top_tokens(
    logits: Float[mx.array, "T V"], k: int
) -> tuple[UInt32[mx.array, "T K"], Float32[mx.array, "T K"], Float32[mx.array, " T"]]:
    """Return the k most probable tokens, their log-probabilities, and the mass of all others."""
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    ids = _largest(logits, k)
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    top = mx.take_along_axis(logits, ids, axis=-1)
    # Summed over the others, not one minus the top: a small tail would be rounding alone.
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    tail = _running_sum(mx.exp(others))[..., -1]
    mass = mx.exp(top).sum(axis=-1) + tail
    return ids, top - mx.log(mass)[..., None], tail / mass


def tail_draws(logits: Float[mx.array, "T V"], k: int, key: mx.array) -> Float32[mx.array, "T V"]:
    """Return logits of which no more than ``k`` are finite, with the same softmax in expectation.

    The ``k`` // 2 most probable tokens keep their probability; which of equal ones are among them
    is left open, but not how many. The mass of all others goes, in equal parts, to the rest of
    ``k`` draws from them: systematic ones, so that a token gets within one part of its share. A
    bucket says nothing of its tokens; draws do, on average.

    Source:
        Anshumann et al. 2025 (sparse logit sampling), arXiv:2503.16870, where all are draws.
    """
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    num_top, num_draws = k // 2, k - k // 2
    ids = _largest(log_probs, num_top)
    top = mx.take_along_axis(log_probs, ids, axis=-1)
    tail = mx.put_along_axis(mx.exp(log_probs), ids, mx.array(0.0), axis=-1)
    upto = _running_sum(tail)
    mass = upto[..., -1:]
    start = mx.random.uniform(shape=mass.shape, key=key)
    passed = mx.floor(upto / mx.maximum(mass, 1e-30) * num_draws + start)
    passed = mx.minimum(passed, num_draws)  # a start next to 1 is rounded up
    counts = passed - mx.concatenate([mx.zeros_like(mass), passed[..., :-1]], axis=-1)
    # Rounding may put a draw on a token of no probability, behind one that has some.
    drawn = mx.where((counts > 0) & (tail > 0), mx.log(counts * mass / num_draws), -mx.inf)
    return mx.put_along_axis(drawn, ids, top, axis=-1)


def rescaled(log_probs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Return the log-probabilities in float32 such that they and the tail sum to one.

    Float16 is off by up to 0.4 % of a probability. That would be the tail's error, too, if it were
    taken as what is missing to one, and a tail can be smaller than that.
    """
    known = log_probs.astype(np.float64)
    mass = np.exp(known).sum(axis=-1)
    return (known + np.log((1 - tail.astype(np.float64)) / mass)[..., None]).astype(np.float32)


def _largest(x: mx.array, count: int) -> mx.array:
    """Return the places of the ``count`` largest values of every row, in no order."""
    least = x.shape[-1] - count
    return mx.argpartition(x, least, axis=-1)[..., least:]


def _running_sum(x: Float32[mx.array, "T V"]) -> Float32[mx.array, "T V"]:
    """Return the sums of every row up to each place, in two steps, within 6e-7."""
    size = x.shape[-1]
    x = mx.pad(x, [(0, 0), (0, -size % PART)]).reshape(len(x), -1, PART)
    within = mx.cumsum(x, axis=-1)
    parts = within[..., -1]
    before = mx.cumsum(parts, axis=-1) - parts
    return (within + before[..., None]).reshape(len(x), -1)[..., :size]
