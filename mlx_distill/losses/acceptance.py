"""A loss on how often a target accepts what a drafter says, not on how well that is known.

    accepted(p, q) = sum of min(p, q)          the share of tokens that speculative sampling accepts
    LK(p, q) = w KL(p || q) + (1 - w) (1 - accepted),      w = exp(-3 accepted)

A small drafter cannot be right everywhere. KL spends what it has on tokens that are hardly ever
drawn; acceptance alone has hardly a gradient where p and q do not meet. So KL leads where little is
accepted yet, acceptance where much is.
"""

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.kernels.acceptance import mixture, variation


def likely_acceptance(
    student_logits: Float[mx.array, "... V"], teacher_logits: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    """Return the LK loss: KL(teacher || student) in nats and the rejected share, mixed.

    The mixture's weight is no function of the student for the gradient. It is each position's own,
    where the paper takes that of the batch's mean. Infinite where the student bars a token that the
    teacher does not; the gradient is finite there.

    Args:
        student_logits: Not normalised.
        teacher_logits: Not normalised; what is accepted is counted among these tokens alone.

    Source:
        Samarin et al. 2026, LK Losses, arXiv:2602.23881: the hybrid loss with eta = 3. That one
        minus the total variation is what is accepted: Leviathan et al. 2023, arXiv:2211.17192,
        corollary 3.6.
    """
    return mixture(student_logits, teacher_logits)


def total_variation(
    student_log_probs: Float[mx.array, "... V"], teacher_log_probs: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    """Return half the L1 distance of the distributions.

    One minus it is the share of tokens that speculative sampling accepts.
    """
    return variation(student_log_probs, teacher_log_probs)
