"""Losses on what networks answer: arrays in, ``(sum, count)`` in float32 out.

Every loss sums over positions; the caller divides once, after it has accumulated.
"""

import mlx.core as mx
from jaxtyping import Float


def entropy(log_probs: Float[mx.array, "... V"]) -> Float[mx.array, "..."]:
    """Return the entropy of normalised log-probabilities, in nats; -inf contributes zero."""
    probs = mx.exp(log_probs)
    return -mx.where(probs > 0, probs * log_probs, 0).sum(axis=-1)


def kl_divergence(
    teacher_probs: Float[mx.array, "... V"],
    teacher_entropy: Float[mx.array, "..."],
    student_logits: Float[mx.array, "... V"],
    mask: Float[mx.array, "..."],
) -> tuple[mx.array, mx.array]:
    """Return the sum of KL(teacher || student) in nats, and the number of positions.

    The gradient reaches the student only.

    Args:
        teacher_probs: Normalised; float32.
        teacher_entropy: Of the same distributions, in nats. A drafter meets one distribution at
            several unrolled steps, so it is computed once, outside.
        student_logits: Not normalised; finite.
        mask: Weight of every position in the sum and in the count.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    student = student_logits.astype(mx.float32)
    cross, _ = _cross_entropy(teacher_probs, student)  # pyright: ignore[reportGeneralTypeIssues]
    divergence = cross - mx.stop_gradient(teacher_entropy)
    return mx.where(mask > 0, divergence * mask, 0).sum(), mask.sum()


@mx.custom_function
def _cross_entropy(probs: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cross entropy of every row, and the student's probabilities for the gradient.

    One exponential per token serves both: the log of the normaliser is read off the largest entry,
    and the gradient q - p needs nothing that the forward has not computed. Off the GPU exponentials
    are what a training step is made of.
    """
    student = mx.softmax(logits, axis=-1)
    log_normaliser = logits.max(axis=-1) - mx.log(student.max(axis=-1))
    # The offset goes first: in float32 the teacher's probabilities sum to one only nearly.
    return (probs * (log_normaliser[..., None] - logits)).sum(axis=-1), student


@_cross_entropy.vjp
def _cross_entropy_vjp(primals, cotangents, outputs):
    probs, logits = primals
    gradient = (outputs[1] - probs) * cotangents[0][..., None]
    return mx.zeros_like(probs), gradient.astype(logits.dtype)
