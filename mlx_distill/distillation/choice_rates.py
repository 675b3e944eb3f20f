"""How often the first, second, ... choice of every Medusa head is right, on held-out answers.

A static tree holds the choices that are right most often; these rates are what it is made by.
"""

import mlx.core as mx
import numpy as np

from mlx_distill.distillation.drafter import Logits, Starts, rows_at_once, unroll
from mlx_distill.drafters.networks import Network

RANKS = 8  # choices that are counted
DIGITS = 4


def choice_rates(
    drafter: Network, starts: Starts, target_logits: Logits
) -> tuple[tuple[float, ...], ...]:
    """Return, for every drafted token, the shares of its choices that are the target's best.

    Nothing where no answer reaches some of them: a head that was not judged has no shares. The text
    itself is what was drafted before.

    Args:
        drafter: Drafts.
        starts: Along held-out answers.
        target_logits: Makes the target's logits of goals, for what can be drafted.
    """
    mask = np.array(starts.mask)
    if not mask.any(axis=0).all():
        return ()
    features = unroll(drafter, starts)
    size = max(1, rows_at_once(drafter.head) // mask.shape[1])
    found: list[np.ndarray] = []
    for first in range(0, mask.shape[0], size):
        rows = slice(first, first + size)
        logits = drafter.head(features[rows])
        best = mx.argmax(target_logits(starts.goals[rows]), axis=-1)
        wanted = mx.take_along_axis(logits, best[..., None], axis=-1)
        ranks = (logits > wanted).sum(axis=-1)
        mx.eval(ranks)  # one chunk at a time is in memory
        found.append(np.array(ranks))
    ranks, counts = np.concatenate(found), mask.sum(axis=0)
    shares = np.stack([((ranks == rank) * mask).sum(axis=0) / counts for rank in range(RANKS)], 1)
    return tuple(tuple(round(float(share), DIGITS) for share in head) for head in shares)
