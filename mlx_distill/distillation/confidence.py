"""How sure a drafter may be: its logits' sharpness, fitted on held-out answers.

Trees hold the likeliest paths by the drafter's own word, so that word has to be as sure of a path
as the target is to take it. A drafter learns the target's whole distribution, but what is verified
is the target's best token (or the best with its noise, which is in the drafter's sight): there it
should be surer than it is. One factor on the logits is fitted so that the target's best tokens are
as likely as can be, along the text:

    sharpness = argmin over s of  - sum of log softmax(s z)[the target's best]

Source:
    Guo et al. 2017, arXiv:1706.04599, section 4.2 (temperature scaling; a sharpness is one over a
    temperature) and equation 3 (expected calibration error, over 15 bins).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.arrays import log_sum_exp
from mlx_distill.distillation.drafter import Logits, Starts, rows_at_once, unroll
from mlx_distill.drafters.networks import Network

CHOICES = tuple(round(0.5 + 0.1 * step, 1) for step in range(26))  # 0.5 to 3
BINS = 15


@dataclass(frozen=True)
class Confidence:
    """What was fitted.

    Args:
        sharpness: What logits are multiplied by.
        error: Expected calibration error of paths with it.
        error_before: The same without: with a sharpness of 1.
    """

    sharpness: float
    error: float
    error_before: float


def fitted_confidence(drafter: Network, starts: Starts, target_logits: Logits) -> Confidence:
    """Return the sharpness under which the target's best tokens are likeliest.

    A path's confidence is the product of its tokens': those that are the drafter's best where the
    text itself was drafted before. It is right if all of them are the target's best.

    Args:
        drafter: The drafter.
        starts: Drafts along held-out answers.
        target_logits: Makes the target's logits of goals, for what can be drafted.
    """
    features, mask = unroll(drafter, starts), np.array(starts.mask)
    size = max(1, rows_at_once(drafter.head) // mask.shape[1])
    parts: list[list[np.ndarray]] = []
    for first in range(0, mask.shape[0], size):
        rows = slice(first, first + size)
        logits = drafter.head(features[rows]).astype(mx.float32)
        best = mx.argmax(target_logits(starts.goals[rows]), axis=-1)
        wanted = mx.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
        top = logits.max(axis=-1)
        sums = mx.stack([log_sum_exp(choice * logits)[..., 0] for choice in CHOICES])
        found = (sums, wanted, top)
        mx.eval(found)  # one chunk at a time is in memory
        parts.append([np.array(x) for x in found])
    kinds = zip(*parts, strict=True)
    sums, wanted, top = (
        np.concatenate(kind, axis=axis) for kind, axis in zip(kinds, (1, 0, 0), strict=True)
    )
    choices = np.array(CHOICES)[:, None, None]
    losses = ((sums - choices * wanted) * mask).sum(axis=(1, 2))
    right = np.logical_and.accumulate(wanted >= top, axis=1)
    paths = np.exp(np.cumsum(choices * top - sums, axis=2))
    chosen, plain = int(losses.argmin()), CHOICES.index(1.0)
    errors = [calibration_error(paths[at], right, mask > 0) for at in (chosen, plain)]
    return Confidence(CHOICES[chosen], *errors)


def calibration_error(
    confidence: Float[np.ndarray, "S L"], right: np.ndarray, mask: np.ndarray
) -> float:
    """Return how far confidences are from shares of right ones, on average over all that count."""
    confidence, right = confidence[mask], right[mask]
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, confidence.size))
