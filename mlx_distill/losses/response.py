"""Losses on what networks answer: one value per position, in float32.

They take log-probabilities, at whatever temperature the objective has chosen; those that need a
normaliser of their own anyway take logits, of which log-probabilities are a case. The gradient
reaches the student only. A token may be barred by -inf: where p has no mass, q does not matter.
"""

import math

import mlx.core as mx
from jaxtyping import Float, Integer

from mlx_distill.arrays import log_probs, log_sum_exp, row_sum, softmax
from mlx_distill.kernels import divergences


def entropy(log_p: Float[mx.array, "... V"]) -> Float[mx.array, "..."]:
    """Return the entropy of normalised log-probabilities, in nats; -inf contributes zero."""
    probs = mx.exp(log_p)
    return -row_sum(probs * mx.where(probs > 0, log_p, 0))


def forward_kl(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    teacher_probs: Float[mx.array, "... V"] | None = None,
) -> Float[mx.array, "..."]:
    """Return KL(teacher || student) in nats.

    Infinite where the student bars a token that the teacher does not.

    Args:
        student_logits: Not normalised.
        teacher_logits: Not normalised.
        teacher_probs: Their softmax in float32, where it is known.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    teacher = mx.stop_gradient(teacher_logits)
    if teacher_probs is None:
        fused = divergences.forward_kl(student_logits, teacher)
        if fused is not None:
            return fused
    teacher = teacher.astype(mx.float32)
    probs = softmax(teacher) if teacher_probs is None else teacher_probs
    student = student_logits.astype(mx.float32)
    values, _ = _forward_kl(student, teacher, probs)  # pyright: ignore[reportGeneralTypeIssues]
    return values


def soft_cross_entropy(
    student_logits: Float[mx.array, "... V"], teacher_logits: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    """Return the student's cross entropy with the teacher's distribution.

    That is KL(teacher || student) and the teacher's entropy, which has no gradient.
    """
    teacher = mx.stop_gradient(teacher_logits)
    return forward_kl(student_logits, teacher) + entropy(log_probs(teacher))


def logit_mse(
    student_logits: Float[mx.array, "... V"], teacher_logits: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    """Return the mean squared difference of logits; of those that neither bars."""
    student, teacher = student_logits.astype(mx.float32), mx.stop_gradient(teacher_logits)
    teacher = teacher.astype(mx.float32)
    both = (student > -mx.inf) & (teacher > -mx.inf)
    difference = mx.where(both, student, 0) - mx.where(both, teacher, 0)
    return row_sum(mx.square(difference)) / mx.maximum(both.sum(axis=-1), 1)


def reverse_kl(
    student_log_probs: Float[mx.array, "... V"], teacher_log_probs: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    """Return KL(student || teacher) in nats.

    Infinite where the teacher bars a token that the student does not.

    Source:
        Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """
    return _kl(student_log_probs, mx.stop_gradient(teacher_log_probs))


def jensen_shannon(
    student_log_probs: Float[mx.array, "... V"],
    teacher_log_probs: Float[mx.array, "... V"],
    beta: float = 0.5,
) -> Float[mx.array, "..."]:
    """Return beta KL(teacher || m) + (1 - beta) KL(student || m), in nats.

    m is beta teacher + (1 - beta) student. It is finite whatever either bars.

    Raises:
        ValueError: If beta is not between 0 and 1: at the ends the divergence is zero.

    Source:
        Agarwal et al. 2024 (GKD), arXiv:2306.13649, equation 1.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must be between 0 and 1, got {beta}; towards 0 and 1 the divergence behaves as "
            "forward_kl and reverse_kl"
        )
    student, teacher = student_log_probs, mx.stop_gradient(teacher_log_probs)
    fused = divergences.jensen_shannon(student, teacher) if beta == 0.5 else None
    if fused is not None:
        return fused
    middle = _mixture(teacher, student, beta)
    return beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)


def skew_forward_kl(
    student_log_probs: Float[mx.array, "... V"],
    teacher_log_probs: Float[mx.array, "... V"],
    alpha: float = 0.1,
) -> Float[mx.array, "..."]:
    """Return KL(teacher || alpha teacher + (1 - alpha) student), in nats.

    Raises:
        ValueError: If alpha is not in [0, 1).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    teacher = mx.stop_gradient(teacher_log_probs)
    return _kl(teacher, _mixture(teacher, student_log_probs, alpha))


def skew_reverse_kl(
    student_log_probs: Float[mx.array, "... V"],
    teacher_log_probs: Float[mx.array, "... V"],
    alpha: float = 0.1,
) -> Float[mx.array, "..."]:
    """Return KL(student || alpha student + (1 - alpha) teacher), in nats.

    Raises:
        ValueError: If alpha is not in [0, 1).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    teacher = mx.stop_gradient(teacher_log_probs)
    return _kl(student_log_probs, _mixture(student_log_probs, teacher, alpha))


def hard_labels(
    student_log_probs: Float[mx.array, "... V"], labels: Integer[mx.array, "..."]
) -> Float[mx.array, "..."]:
    """Return the student's cross entropy with the true tokens or classes.

    Labels that are none, as -100, have a value that means nothing: the mask leaves them out.
    """
    return -_at(student_log_probs, labels)


def decoupled_kd(
    student_log_probs: Float[mx.array, "... V"],
    teacher_log_probs: Float[mx.array, "... V"],
    labels: Integer[mx.array, "..."],
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Float[mx.array, "..."]:
    """Return alpha TCKD + beta NCKD.

    KL(teacher || student) falls into what it says of the true class against all others (TCKD) and
    among the others (NCKD), the latter weighted by the teacher's doubt. Here each has a weight of
    its own.

    Source:
        Zhao et al. 2022, arXiv:2203.08679, equation 7.
    """
    width = student_log_probs.shape[-1]
    true = mx.arange(width) == mx.clip(labels, 0, width - 1)[..., None]

    def parts(every: mx.array) -> tuple[mx.array, mx.array]:
        others = mx.where(true, -mx.inf, every)
        none = others.max(axis=-1, keepdims=True) == -mx.inf  # of one class there are no others
        rest = log_sum_exp(mx.where(none, 0, others))
        binary = [_at(every, labels)[..., None], mx.where(none, -mx.inf, rest)]
        return mx.concatenate(binary, axis=-1), mx.where(none, -mx.inf, others - rest)

    teacher_binary, teacher_others = parts(mx.stop_gradient(teacher_log_probs))
    student_binary, student_others = parts(student_log_probs)
    target = _weighted(alpha, _kl(teacher_binary, student_binary))
    return target + _weighted(beta, _weighted_difference(teacher_others, student_others))


def _weighted(weight: float, loss: mx.array) -> mx.array:
    """Return a weight times a loss; a weight of 0 leaves it out, be it infinite."""
    return weight * loss if weight else mx.zeros_like(loss)


def sparse_kl(
    student_log_probs: Float[mx.array, "... V"],
    top_ids: Integer[mx.array, "... K"],
    top_log_probs: Float[mx.array, "... K"],
    tail: str = "bucket",
    log_prior: Float[mx.array, " V"] | None = None,
) -> Float[mx.array, "..."]:
    """Return KL(teacher || student) where only the teacher's top tokens are known.

    Args:
        student_log_probs: Normalised.
        top_ids: The teacher's most probable tokens, all different.
        top_log_probs: Their log-probabilities; normalised over the whole vocabulary, unless the
            tail is "teacher" or "both".
        tail: "bucket" makes one class of all other tokens, on both sides; "teacher" renormalises
            the teacher over its top tokens, and so teaches that the others are impossible; "both"
            renormalises both, and so says nothing of the others; "prior" is the bucket, with the
            teacher's mass in it spread as the prior's.
        log_prior: How probable each token is where nothing is known, for the tail "prior".

    Raises:
        ValueError: If the kind of tail is unknown.
    """
    if tail not in ("bucket", "teacher", "both", "prior"):
        raise ValueError(f"tail must be bucket, teacher, both or prior, got {tail}")
    known = mx.stop_gradient(top_log_probs).astype(mx.float32)
    student = mx.take_along_axis(student_log_probs, top_ids, axis=-1)
    if tail in ("teacher", "both"):
        student = log_probs(student) if tail == "both" else student
        return _weighted_difference(log_probs(known), student)
    values = _weighted_difference(known, student)
    if top_ids.shape[-1] == student_log_probs.shape[-1]:  # no token is left for the bucket
        return values
    rest = mx.put_along_axis(student_log_probs, top_ids, mx.array(-mx.inf), axis=-1)
    mass = mx.maximum(1 - mx.exp(known).sum(axis=-1), 0)
    # A teacher without a tail says nothing of it; log 1 stands in, and is multiplied by zero. The
    # student may bar all those tokens, and zero times infinity would be no number.
    rest = mx.where(mass[..., None] > 0, rest, 0)
    values = values + mass * mx.log(mx.where(mass > 0, mass, 1))
    if tail == "bucket":
        return values - mass * log_sum_exp(rest)[..., 0]
    assert log_prior is not None
    return values + mass * _from_prior(log_prior, top_ids, rest)


def sorted_l1(
    student_log_probs: Float[mx.array, "... V"], teacher_log_probs: Float[mx.array, "... U"]
) -> Float[mx.array, "..."]:
    """Return the L1 distance of the sorted distributions.

    It compares how sure two networks are, not of what, so their vocabularies may differ.

    Source:
        Boizard et al. 2024 (universal logit distillation), arXiv:2402.12030, equation 3.
    """
    teacher, student = mx.exp(mx.stop_gradient(teacher_log_probs)), mx.exp(student_log_probs)
    width = max(teacher.shape[-1], student.shape[-1])
    teacher, student = (
        mx.sort(mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(width - x.shape[-1], 0)]), axis=-1)
        for x in (teacher, student)
    )
    return row_sum(mx.abs(teacher - student))


def _at(values: mx.array, labels: mx.array) -> mx.array:
    """Return the values of labels; of those that are none, of some token."""
    places = mx.clip(labels, 0, values.shape[-1] - 1)[..., None]
    return mx.take_along_axis(values, places, axis=-1)[..., 0]


def _kl(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Return KL(p || q) of each row.

    In float32 distributions sum to one only nearly. The sums' difference takes that error out of
    the value: it is never below zero by more than rounding, and zero between equals.
    """
    return _weighted_difference(log_p, log_q) + row_sum(mx.exp(log_q) - mx.exp(log_p))


def _weighted_difference(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Return the sum of p (log p - log q); where p has no mass, q does not matter."""
    probs = mx.exp(log_p)
    has_mass = probs > 0
    # The zeros go in before the difference: infinities would come back in the gradient.
    difference = mx.where(has_mass, log_p, 0) - mx.where(has_mass, log_q, 0)
    return row_sum(probs * difference)


def _mixture(log_p: mx.array, log_q: mx.array, alpha: float) -> mx.array:
    """Return the log of alpha p + (1 - alpha) q."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
    if alpha == 0:
        return log_q
    barred = (log_p == -mx.inf) & (log_q == -mx.inf)
    log_p, log_q = mx.where(barred, 0, log_p), mx.where(barred, 0, log_q)
    mixed = mx.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha))
    return mx.where(barred, -mx.inf, mixed)


def _from_prior(log_prior: mx.array, top_ids: mx.array, rest: mx.array) -> mx.array:
    """Return KL(prior || student) among the tokens that are not known, and the student's share.

    Args:
        log_prior: Of all tokens; not normalised.
        top_ids: The known ones.
        rest: The student's log-probabilities of the others, -inf elsewhere.
    """
    shape = (*top_ids.shape[:-1], log_prior.size)
    prior = mx.broadcast_to(softmax(log_prior), shape)
    within = mx.put_along_axis(prior, top_ids, mx.array(0.0), axis=-1)
    within = within / mx.maximum(row_sum(within)[..., None], 1e-30)
    return _weighted_difference(mx.log(within), rest)


@mx.custom_function
def _forward_kl(student: mx.array, teacher: mx.array, probs: mx.array) -> tuple[mx.array, mx.array]:
    """Return KL(teacher || student), and the student's probabilities for the gradient.

    One exponential per token and network serves all: the normalisers are read off the largest
    entries, and the gradient q - p needs nothing that the forward has not computed. Off the GPU
    exponentials are a fourth of a training step.
    """
    own = softmax(student)

    def top(x: mx.array) -> mx.array:
        return x.max(axis=-1, keepdims=True)

    # log p - log q of an entry is the logits' difference less that of the normalisers.
    offset = (top(teacher) - top(student)) - (mx.log(top(probs)) - mx.log(top(own)))
    return row_sum(mx.where(probs > 0, probs * (teacher - student - offset), 0)), own


@_forward_kl.vjp
def _forward_kl_vjp(primals, cotangents, outputs):
    _, teacher, probs = primals
    gradient = (outputs[1] - probs) * cotangents[0][..., None]
    return gradient, mx.zeros_like(teacher), mx.zeros_like(probs)
