"""Feature and relation losses of a batch: which places count, and what is added up.

The losses return a value per position or example. Of texts only the learned tokens count, and the
relations between them are those of some evenly spaced ones.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import to_host
from mlx_distill.distillation.objective import weighted_sum
from mlx_distill.distillation.terms import LOSSES, LossTerm
from mlx_distill.errors import InputError
from mlx_distill.losses import relation

RELATION_TOKENS = 128  # of a batch of texts, that relation losses compare
Pair = tuple[mx.array, mx.array]  # the student's features, and the teacher's
PER_TOKEN = ("hidden_mse", "hidden_cosine", "patient_kd")


def compare(
    term: LossTerm, pairs: Sequence[Pair], mask: mx.array, num_examples: int
) -> tuple[mx.array, mx.array]:
    """Return the sum and the count of a loss's values over pairs of features; of weights, theirs.

    Args:
        term: A feature or a relation loss.
        pairs: Features of the student, as wide as the teacher's, and the teacher's.
        mask: Of a batch of texts, (B, T), 1 at learned tokens; of other examples, (B,), weights.
        num_examples: Size of the training set.
    """
    total, count = mx.array(0.0), mx.array(0.0)
    some = _weighted(mask.max(axis=1) if mask.ndim == 2 else mask)
    mask = mask[some]
    if not mask.size:
        return total, count
    texts, weights = (mask, None) if mask.ndim == 2 else (None, mask)
    pairs = [(ours[some], theirs[some]) for ours, theirs in pairs]
    if term.name == "flow_of_solution":
        for (a, b), (c, d) in pairwise(pairs):
            ours, theirs = _masked((a, c), texts), _masked((b, d), texts)
            values = relation.flow_of_solution(ours, theirs, **term.options)
            value, number = _sum(values, weights)
            total, count = total + value, count + number
        return total, count
    for ours, theirs in pairs:
        both = same_places(ours, theirs)
        value, number = _of_pair(term, *both, texts, weights, num_examples)
        total, count = total + value, count + number
    return total, count


def _of_pair(
    term: LossTerm,
    ours: mx.array,
    theirs: mx.array,
    mask: mx.array | None,
    weights: mx.array | None,
    num_examples: int,
) -> tuple[mx.array, mx.array]:
    loss, options = LOSSES[term.name], term.options
    if mask is not None and term.name in ("attention_transfer", "neuron_selectivity"):
        # Their maps have an entry per token, and what is not learned is none.
        values = loss(ours * mask[..., None], theirs * mask[..., None], **options)
        return values.sum(), mask.sum() if values.ndim == 2 else mx.array(float(values.size))
    if mask is not None and term.name in PER_TOKEN:
        return weighted_sum(loss(ours, theirs, **options), mask), mask.sum()
    if mask is not None:
        some = some_places(mask)
        ours, theirs = (x.reshape(-1, x.shape[-1])[some] for x in (ours, theirs))
    if term.name == "contrastive":
        if ours.shape[0] < 2:  # an epoch's last batch: there is nothing to tell it from
            return mx.array(0.0), mx.array(0.0)
        ours, theirs = (x.reshape(x.shape[0], -1, x.shape[-1]).mean(axis=1) for x in (ours, theirs))
        options = {**options, "num_examples": num_examples}
    return _sum(loss(ours, theirs, **options), weights)


def _weighted(mask: mx.array) -> Any:
    """Return which examples have a weight; others are nobody's neighbours either."""
    some = [place for place, weight in enumerate(to_host(mask)) if weight > 0]
    return slice(None) if len(some) == mask.size else mx.array(some, mx.int32)


def _sum(values: mx.array, weights: mx.array | None) -> tuple[mx.array, mx.array]:
    """Return the sum of values, weighted by their first axis, and what it is to be divided by."""
    if weights is None:
        return values.sum(), mx.array(float(values.size))
    weights = weights.astype(mx.float32).reshape(-1, *[1] * (values.ndim - 1))
    weights = mx.broadcast_to(weights, values.shape)
    return (values * weights).sum(), weights.sum()


def same_places(ours: mx.array, theirs: mx.array) -> Pair:
    """Return two images' features with the same height and width: the larger one is averaged.

    Raises:
        InputError: If neither is a whole multiple of the other.
    """
    if ours.ndim != 4 or theirs.ndim != 4 or ours.shape[1:3] == theirs.shape[1:3]:
        return ours, theirs
    height, width = (min(a, b) for a, b in zip(ours.shape[1:3], theirs.shape[1:3], strict=True))
    if any(x.shape[1] % height or x.shape[2] % width for x in (ours, theirs)):
        raise InputError(
            f"features of {ours.shape[1:3]} and {theirs.shape[1:3]} places do not fit each other"
        )

    def shrunk(x: mx.array) -> mx.array:
        batch, tall, wide, channels = x.shape
        parts = x.reshape(batch, height, tall // height, width, wide // width, channels)
        return parts.mean(axis=(2, 4))

    return shrunk(ours), shrunk(theirs)


def some_places(mask: mx.array) -> mx.array:
    """Return where evenly spaced learned tokens of a batch of texts are, in its flat order."""
    learned = [place for place, one in enumerate(to_host(mask.reshape(-1))) if one]
    return mx.array(learned[:: -(-len(learned) // RELATION_TOKENS) or 1], mx.int32)


def _masked(parts: Pair, mask: mx.array | None) -> Pair:
    """Return two layers' features such that the mean of their products is of learned tokens."""
    if mask is None:
        return parts
    share = mask.sum(axis=1, keepdims=True) / mask.shape[1]
    weights = mask * mx.rsqrt(mx.maximum(share, 1e-12))
    first, second = (part * weights[..., None] for part in parts)
    return first, second
