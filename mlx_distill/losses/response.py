"""Losses on what networks answer: arrays in, ``(sum, count)`` in float32 out.

Every loss sums over positions; the caller divides once, after it has accumulated. ``mask`` weighs
the positions in the sum and in the count. The gradient reaches the student only.

A ``temperature`` divides both networks' logits. Gradients shrink with its square, so the losses
between distributions are multiplied by it (Hinton et al. 2015, section 2.1), unless ``scaled`` is
False.
"""

import math

import mlx.core as mx
from jaxtyping import Float, Integer, Shaped

Loss = tuple[mx.array, mx.array]


def entropy(log_probs: Float[mx.array, "... V"]) -> Float[mx.array, "..."]:
    """Return the entropy of normalised log-probabilities, in nats; -inf contributes zero."""
    probs = mx.exp(log_probs)
    return -mx.where(probs > 0, probs * log_probs, 0).sum(axis=-1)


def kl_divergence(
    teacher_probs: Float[mx.array, "... V"],
    teacher_entropy: Float[mx.array, "..."],
    student_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
) -> Loss:
    """Return the sum of KL(teacher || student) in nats, and the number of positions.

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
    return _total(cross - mx.stop_gradient(teacher_entropy), mask)


def forward_kl(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of KL(teacher || student) in nats, and the count.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    teacher = mx.stop_gradient(teacher_logits).astype(mx.float32) / temperature
    student = student_logits.astype(mx.float32) / temperature
    # One exponential per entry: the normaliser is read off the largest one.
    probs = mx.softmax(teacher, axis=-1)
    log_normaliser = teacher.max(axis=-1) - mx.log(probs.max(axis=-1))
    uncertainty = log_normaliser - mx.where(probs > 0, probs * teacher, 0).sum(axis=-1)
    total, count = kl_divergence(probs, uncertainty, student, mask)
    return _scale(temperature, scaled) * total, count


def reverse_kl(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of KL(student || teacher) in nats, and the count.

    Infinite where the teacher bars a token, with a logit of -inf, that the student does not.

    Source:
        Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """
    teacher = _teacher_log_probs(teacher_logits, temperature)
    values = _kl(_log_probs(student_logits, temperature), teacher)
    return _total(values, mask, _scale(temperature, scaled))


def jensen_shannon(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    beta: float = 0.5,
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of beta KL(teacher || m) + (1 - beta) KL(student || m), and the count.

    m is beta teacher + (1 - beta) student.

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
    teacher = _teacher_log_probs(teacher_logits, temperature)
    student = _log_probs(student_logits, temperature)
    middle = mx.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    values = beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)
    return _total(values, mask, _scale(temperature, scaled))


def skew_forward_kl(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    alpha: float = 0.1,
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of KL(teacher || alpha teacher + (1 - alpha) student), and the count.

    Raises:
        ValueError: If alpha is not in [0, 1).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    teacher = _teacher_log_probs(teacher_logits, temperature)
    mixed = _mixture(teacher, _log_probs(student_logits, temperature), alpha)
    return _total(_kl(teacher, mixed), mask, _scale(temperature, scaled))


def skew_reverse_kl(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    alpha: float = 0.1,
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of KL(student || alpha student + (1 - alpha) teacher), and the count.

    Raises:
        ValueError: If alpha is not in [0, 1).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    student = _log_probs(student_logits, temperature)
    mixed = _mixture(student, _teacher_log_probs(teacher_logits, temperature), alpha)
    return _total(_kl(student, mixed), mask, _scale(temperature, scaled))


def total_variation(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
) -> Loss:
    """Return the sum of half the L1 distance of the distributions, and the count.

    One minus it is the share of tokens that speculative sampling accepts.
    """
    teacher = mx.exp(_teacher_log_probs(teacher_logits, temperature))
    student = mx.softmax(student_logits.astype(mx.float32) / temperature, axis=-1)
    return _total(0.5 * mx.abs(teacher - student).sum(axis=-1), mask)


def soft_cross_entropy(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of the student's cross entropy with the teacher's distributions.

    That is KL(teacher || student) and the teacher's entropy, which has no gradient.
    """
    teacher = mx.exp(_teacher_log_probs(teacher_logits, temperature))
    student = student_logits.astype(mx.float32) / temperature
    total, count = kl_divergence(teacher, mx.zeros(mask.shape), student, mask)
    return _scale(temperature, scaled) * total, count


def logit_mse(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
) -> Loss:
    """Return the sum over positions of the mean squared difference of logits / temperature."""
    teacher = mx.stop_gradient(teacher_logits).astype(mx.float32)
    difference = (student_logits.astype(mx.float32) - teacher) / temperature
    return _total(mx.square(difference).mean(axis=-1), mask)


def hard_labels(
    student_logits: Float[mx.array, "... V"],
    labels: Integer[mx.array, "..."],
    mask: Shaped[mx.array, "..."],
) -> Loss:
    """Return the sum of the student's cross entropy with the true tokens or classes."""
    logits = student_logits.astype(mx.float32)
    places = mx.maximum(labels, 0)[..., None]  # what is masked may hold -100
    right = mx.take_along_axis(logits, places, axis=-1)[..., 0]
    return _total(mx.logsumexp(logits, axis=-1) - right, mask)


def decoupled_kd(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... V"],
    labels: Integer[mx.array, "..."],
    mask: Shaped[mx.array, "..."],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    scaled: bool = True,
) -> Loss:
    """Return the sum of alpha TCKD + beta NCKD, and the count.

    KL(teacher || student) falls into what it says of the true class against all others (TCKD) and
    among the others (NCKD), the latter weighted by the teacher's doubt. Here each has a weight of
    its own.

    Source:
        Zhao et al. 2022, arXiv:2203.08679, equation 7.
    """
    teacher = _teacher_log_probs(teacher_logits, temperature)
    student = _log_probs(student_logits, temperature)
    true = mx.arange(teacher.shape[-1]) == labels[..., None]

    def parts(log_probs: mx.array) -> tuple[mx.array, mx.array]:
        others = mx.where(true, -mx.inf, log_probs)
        rest = mx.logsumexp(others, axis=-1)
        binary = mx.stack([mx.where(true, log_probs, 0).sum(axis=-1), rest], axis=-1)
        # The true class is out of the second part: zero on both sides, so that nothing is infinite.
        return binary, mx.where(true, 0, log_probs - rest[..., None])

    (teacher_binary, teacher_others), (student_binary, student_others) = map(
        parts, (teacher, student)
    )
    others = mx.where(true, 0, mx.exp(teacher_others) * (teacher_others - student_others))
    values = alpha * _kl(teacher_binary, student_binary) + beta * others.sum(axis=-1)
    return _total(values, mask, _scale(temperature, scaled))


def sparse_kl(
    student_logits: Float[mx.array, "... V"],
    top_ids: Integer[mx.array, "... K"],
    top_log_probs: Float[mx.array, "... K"],
    mask: Shaped[mx.array, "..."],
    tail: str = "bucket",
    temperature: float = 1.0,
    scaled: bool = True,
    log_prior: Float[mx.array, " V"] | None = None,
) -> Loss:
    """Return the sum of KL(teacher || student) where only the teacher's top tokens are known.

    Args:
        student_logits: Not normalised.
        top_ids: The teacher's most probable tokens, all different.
        top_log_probs: Their log-probabilities at temperature 1, normalised over the whole
            vocabulary.
        mask: Weight of every position.
        tail: "bucket" makes one class of all other tokens, on both sides; "teacher" renormalises
            the teacher over its top tokens, and so teaches that the others are impossible; "both"
            renormalises both, and so says nothing of the others; "prior" is the bucket, with the
            teacher's mass in it spread as the prior's.
        temperature: Other than 1 only without the bucket: how the tail would spread is not known.
        scaled: Multiply by the temperature's square.
        log_prior: How probable each token is where nothing is known, for the tail "prior".

    Raises:
        ValueError: If the kind of tail is unknown, or the bucket meets a temperature.
    """
    if tail not in ("bucket", "teacher", "both", "prior"):
        raise ValueError(f"tail must be bucket, teacher, both or prior, got {tail}")
    if tail in ("bucket", "prior") and temperature != 1:
        raise ValueError(
            f"a tail bucket needs temperature 1, got {temperature}; use tail teacher or both"
        )
    known = mx.stop_gradient(top_log_probs).astype(mx.float32)
    logits = student_logits.astype(mx.float32) / temperature
    at_top = mx.take_along_axis(logits, top_ids, axis=-1)
    if tail == "both":
        return _total(
            _kl(_log_softmax(known / temperature), _log_softmax(at_top)),
            mask,
            _scale(temperature, scaled),
        )
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    student = at_top - normaliser
    if tail == "teacher":
        values = _kl(_log_softmax(known / temperature), student)
        return _total(values, mask, _scale(temperature, scaled))
    if top_ids.shape[-1] == logits.shape[-1]:  # no token is left for the bucket
        return _total(_kl(known, student), mask)
    rest = mx.put_along_axis(logits, top_ids, mx.array(-mx.inf), axis=-1)
    student_tail = mx.logsumexp(rest, axis=-1) - normaliser[..., 0]
    teacher_tail = mx.maximum(1 - mx.exp(known).sum(axis=-1), 0)
    # A teacher without a tail says nothing of it; log 1 stands in, and is multiplied by zero.
    log_tail = mx.log(mx.where(teacher_tail > 0, teacher_tail, 1))
    values = _kl(known, student) + teacher_tail * (log_tail - student_tail)
    if tail == "prior":
        assert log_prior is not None
        shape = (*top_ids.shape[:-1], log_prior.size)
        prior = mx.broadcast_to(mx.softmax(log_prior.astype(mx.float32)), shape)
        within = mx.put_along_axis(prior, top_ids, mx.array(0.0), axis=-1)
        within = within / mx.maximum(within.sum(axis=-1, keepdims=True), 1e-30)
        inside = mx.where(within > 0, within * (mx.log(mx.maximum(within, 1e-30)) - rest), 0)
        values = values + teacher_tail * (inside.sum(axis=-1) + mx.logsumexp(rest, axis=-1))
    return _total(values, mask)


def sorted_l1(
    student_logits: Float[mx.array, "... V"],
    teacher_logits: Float[mx.array, "... U"],
    mask: Shaped[mx.array, "..."],
    temperature: float = 1.0,
) -> Loss:
    """Return the sum of the L1 distances of the sorted distributions, and the count.

    It compares how sure two networks are, not of what, so their vocabularies may differ.

    Source:
        Boizard et al. 2024 (universal logit distillation), arXiv:2402.12030, equation 3.
    """
    teacher = mx.exp(_teacher_log_probs(teacher_logits, temperature))
    student = mx.softmax(student_logits.astype(mx.float32) / temperature, axis=-1)
    width = max(teacher.shape[-1], student.shape[-1])
    teacher, student = (
        mx.sort(mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(width - x.shape[-1], 0)]), axis=-1)
        for x in (teacher, student)
    )
    return _total(mx.abs(teacher - student).sum(axis=-1), mask)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _log_probs(logits: mx.array, temperature: float) -> mx.array:
    return _log_softmax(logits.astype(mx.float32) / temperature)


def _teacher_log_probs(logits: mx.array, temperature: float) -> mx.array:
    return mx.stop_gradient(_log_probs(logits, temperature))


def _kl(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Return KL(p || q) of each row; where p has no mass, q does not matter."""
    probs = mx.exp(log_p)
    return mx.where(probs > 0, probs * (log_p - log_q), 0).sum(axis=-1)


def _mixture(log_p: mx.array, log_q: mx.array, alpha: float) -> mx.array:
    """Return the log of alpha p + (1 - alpha) q."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
    if alpha == 0:
        return log_q
    return mx.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha))


def _scale(temperature: float, scaled: bool) -> float:
    return temperature**2 if scaled else 1.0


def _total(values: mx.array, mask: mx.array, scale: float = 1.0) -> Loss:
    """Return the weighted sum of some values and the sum of the weights."""
    mask = mask.astype(mx.float32)
    return scale * mx.where(mask > 0, values * mask, 0).sum(), mask.sum()


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
