"""The filters of a distribution: mlx-lm's own sets of tokens, without sorting the vocabulary.

mlx-lm sorts all of it for top-p: 12 ms for a row of 128,000 tokens on two CPU cores. The tokens
that are kept are among the few most probable ones almost always, and a partition finds those. Where
they were not enough, or float32 leaves a doubt which tokens mlx-lm would keep, the row is marked;
whoever reads the draws, once per call, makes them again with ``filter_exactly``. So nothing waits.

Nothing here is compiled, so that another threshold compiles nothing.
"""

import math

import mlx.core as mx
from jaxtyping import Bool, Float

# A model's 95 % are within a few hundred tokens; a flat row needs more.
CANDIDATES = 2048
# Masses of other roundings differ by half as much; what is nearer to a border is in doubt.
ROUNDING = 2e-6


def filter_exactly(
    logits: Float[mx.array, "... V"], top_p: float, min_p: float, top_k: int
) -> Float[mx.array, "... V"]:
    """Return the log-probabilities with -inf where a filter drops a token.

    Args:
        logits: Not normalised.
        top_p: Keep the smallest set of most probable tokens with this share of the mass, and what
            ties with the last of them; 1 keeps all.
        min_p: Then keep tokens at least this many times as probable as the best; 0 keeps all.
        top_k: Then keep so many, of equal ones those that mlx-lm keeps; 0 keeps all.
    """
    kept = logits.astype(mx.float32)
    kept = kept - mx.logsumexp(kept, axis=-1, keepdims=True)  # rounded as mlx-lm's
    if top_p < 1:
        ranked = mx.sort(kept, axis=-1)
        probs = mx.exp(ranked)
        above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
        dropped = above >= top_p * (above[..., :1] + probs[..., :1])
        # The best one stays, also where float32 takes the border for 0.
        num_dropped = mx.minimum(dropped.sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
        kept = _above(kept, mx.take_along_axis(ranked, num_dropped, axis=-1))
    if min_p > 0:
        kept = _above(kept, kept.max(axis=-1, keepdims=True) + math.log(min_p))
    if 0 < top_k < logits.shape[-1]:
        best = mx.argpartition(-kept, kth=top_k - 1, axis=-1)[..., :top_k]
        values = mx.take_along_axis(kept, best, axis=-1)
        kept = mx.put_along_axis(mx.full(kept.shape, -mx.inf), best, values, axis=-1)
    return kept


def can_filter_fast(vocab_size: int, top_p: float, top_k: int) -> bool:
    """Return whether ``filter_fast`` takes such filters, and gains anything."""
    return vocab_size > 2 * CANDIDATES and (top_p < 1 or top_k > 0) and top_k <= CANDIDATES


def filter_fast(
    logits: Float[mx.array, "... V"], top_p: float, min_p: float, top_k: int
) -> tuple[Float[mx.array, "... V"], Bool[mx.array, "..."]]:
    """Return what ``filter_exactly`` returns, less the best; and whether each row is certain.

    The arguments are those of ``filter_exactly``; see ``can_filter_fast``.
    """
    logits = logits.astype(mx.float32)
    if top_p == 1:
        return _top_k(logits, min_p, top_k)
    logits = logits - logits.max(axis=-1, keepdims=True)
    # A power is four times as fast as the exponential function of MLX on a CPU.
    weights = mx.power(math.e, logits)
    total = weights.sum(axis=-1, keepdims=True)
    head = _largest(weights, CANDIDATES)
    above = head > head[..., :1]  # what ties with the least of them counts as one of the others
    others = mx.where(weights > head[..., :1], 0, weights)
    last, certain = _top_p(mx.where(above, head, 0) / total, others / total, top_p)
    threshold = mx.take_along_axis(head, last, axis=-1)
    if top_k:
        threshold = mx.maximum(threshold, head[..., CANDIDATES - top_k, None])
    kept = mx.where(weights < threshold, -mx.inf, logits)
    if min_p > 0:
        kept = _above(kept, mx.array(math.log(min_p)))
    if top_k:  # ties with the last one are more than top-k keeps
        certain = certain & ((kept > -mx.inf).sum(axis=-1) <= top_k)
    return kept, certain


def _top_k(
    logits: Float[mx.array, "... V"], min_p: float, top_k: int
) -> tuple[Float[mx.array, "... V"], Bool[mx.array, "..."]]:
    """Return what ``filter_fast`` returns where top-p keeps all: nothing has to be normalised."""
    best = _largest(logits, top_k + 1)
    least = best[..., 1:2]
    if min_p > 0:
        least = mx.maximum(least, best[..., -1:] + math.log(min_p))
    kept = mx.where(logits < least, -mx.inf, logits - best[..., -1:])
    # Ties with the last one are more than top-k keeps; of barred tokens there may be any number.
    return kept, (best[..., 0] < least[..., 0]) | (best[..., 0] == -mx.inf)


def _largest(values: Float[mx.array, "... V"], count: int) -> Float[mx.array, "... C"]:
    """Return the ``count`` largest values, ascending: they are in the columns with most at the top.

    5 1 0 7    the largest 2 are in the 2 columns with the largest maxima, 7 and 6
    2 3 6 4
    """
    *rows, size = values.shape
    height = math.isqrt(2 * size // count)  # half as many maxima as values in what is taken
    split = size // height * height
    columns = values[..., :split].reshape(*rows, height, -1)
    place = columns.shape[-1] - count
    best = mx.argpartition(columns.max(axis=-2), place, axis=-1)[..., None, place:]
    found = mx.take_along_axis(columns, best, axis=-1).reshape(*rows, -1)
    found = mx.concatenate([found, values[..., split:]], axis=-1)
    place = found.shape[-1] - count
    return mx.sort(mx.partition(found, place, axis=-1)[..., place:], axis=-1)


def _top_p(
    head: Float[mx.array, "... C"], tail: Float[mx.array, "... R"], top_p: float
) -> tuple[mx.array, Bool[mx.array, "..."]]:
    """Return the place of the last token that is kept, (..., 1), and whether that is certain.

    Args:
        head: The largest probabilities, ascending; perhaps behind some zeros.
        tail: The others, in no order, and perhaps zeros.
        top_p: Share of the mass.
    """
    above = mx.cumsum(head, axis=-1, reverse=True, inclusive=False)
    mass = above[..., :1] + head[..., :1]
    # Added one by one, as mlx-lm does it: in float32 the smallest are lost on the way, and its
    # border is a share of what is left. The order of the others makes no difference as long as the
    # sum stays between two powers of two.
    total = mx.cumsum(mx.concatenate([mass, tail], axis=-1), axis=-1)[..., -1:]
    border = top_p * total
    certain = (mass >= 1) | ((mass >= 0.5) & (total < 1)) | (total - mass < ROUNDING / 2)
    certain = certain & (mass >= border + ROUNDING)
    certain = certain & (mx.abs(above - border) > ROUNDING).all(axis=-1, keepdims=True)
    num_dropped = (above >= border).sum(axis=-1, keepdims=True)
    return mx.minimum(num_dropped, head.shape[-1] - 1), certain[..., 0]


def _above(values: mx.array, least: mx.array) -> mx.array:
    return mx.where(values < least, -mx.inf, values)
