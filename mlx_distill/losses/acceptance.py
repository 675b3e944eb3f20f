"""A loss on how often a target accepts what a drafter says, not on how well that is known.

    accepted(p, q) = sum of min(p, q)          the share of tokens that speculative sampling accepts
    LK(p, q) = w KL(p || q) + (1 - w) (1 - accepted),      w = exp(-3 accepted)

A small drafter cannot be right everywhere. KL spends what it has on tokens that are hardly ever
drawn; acceptance alone has hardly a gradient where p and q do not meet. So KL leads where little is
accepted yet, acceptance where much is.
"""

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.arrays import row_sum, softmax
from mlx_distill.losses.response import forward_kl

# How fast acceptance takes over from the divergence; the paper's.
ETA = 3.0


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
    teacher = mx.stop_gradient(teacher_logits).astype(mx.float32)
    student = student_logits.astype(mx.float32)
    values, _ = _mixed(student, teacher)  # pyright: ignore[reportGeneralTypeIssues]
    return values


@mx.custom_function
def _mixed(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    """Return the values and their gradients, which need nothing that the values do not."""
    p, q = softmax(teacher), softmax(student)
    below = q < p
    accepted = row_sum(mx.minimum(p, q))
    weight = mx.exp(-ETA * accepted)
    values = weight * forward_kl(student, teacher, p) + (1 - weight) * (1 - accepted)
    # Of the share that is rejected: where q is below p, more of it is accepted; the softmax takes
    # that from all tokens.
    rejected = q * (row_sum(q * below)[..., None] - below)
    weight = weight[..., None]
    return values, weight * (q - p) + (1 - weight) * rejected


@_mixed.vjp
def _mixed_vjp(primals, cotangents, outputs):
    return outputs[1] * cotangents[0][..., None], mx.zeros_like(primals[1])
