"""Divergences of logits by mlx-lm's own kernels, where Metal is; its users have proved them.

They read the vocabulary once each way and write no probabilities. A token that is barred by -inf
would make no number in them, nor would one that is far less probable than the other network says:
both get the least that matters before.
"""

import mlx.core as mx
from jaxtyping import Float

from mlx_distill import compat
from mlx_distill.kernels.choice import trusted

LEAST = -1e30  # of logits; mlx-lm's own stand-in for none
LEAST_LOG_PROB = -80.0  # exponentials of differences stay finite
INFINITE = 1e9  # no divergence of logits that are numbers
MOST = 2**31  # numbers that the kernels can count


def forward_kl(
    student_logits: Float[mx.array, "... V"], teacher_logits: Float[mx.array, "... V"]
) -> Float[mx.array, "..."] | None:
    """Return KL(teacher || student) in nats; None where no kernel takes these.

    Infinite where the student bars a token that the teacher does not.
    """
    kernels = _kernels(student_logits)
    if kernels is None:
        return None
    # A half precision's results would be rounded to it.
    values = kernels[0](_at_least(student_logits, LEAST), _at_least(teacher_logits, LEAST))
    return mx.where(values > INFINITE, mx.inf, values)


def jensen_shannon(
    student_log_probs: Float[mx.array, "... V"], teacher_log_probs: Float[mx.array, "... V"]
) -> Float[mx.array, "..."] | None:
    """Return the Jensen-Shannon divergence in nats; None where no kernel takes these."""
    kernels = _kernels(student_log_probs)
    if kernels is None:
        return None
    pair = (_at_least(x, LEAST_LOG_PROB) for x in (student_log_probs, teacher_log_probs))
    return kernels[1](*pair)


def _kernels(logits: mx.array) -> tuple[compat.Divergence, compat.Divergence] | None:
    takes = logits.ndim > 1 and 0 < logits.size < MOST
    return compat.divergence_kernels() if takes and trusted() else None


def _at_least(x: mx.array, least: float) -> mx.array:
    return mx.maximum(x.astype(mx.float32), least)
