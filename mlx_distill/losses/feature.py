"""Losses on what networks compute inside: one value per position, in float32.

Student and teacher arrays have the same width; where the networks' widths differ, a learned
projection comes first. The gradient reaches the student only.
"""

import mlx.core as mx
from jaxtyping import Float


def hidden_mse(
    student: Float[mx.array, "... D"], teacher: Float[mx.array, "... D"], relative: bool = True
) -> Float[mx.array, "..."]:
    """Return the mean squared difference.

    Args:
        student: Features, of a token or an image.
        teacher: The same of the teacher.
        relative: In units of the teacher's own mean square at the position: 0 between equals, 1 for
            a student that computes zeros. Features of real models have squares from a hundredth to
            some thousands, next to which no divergence of the answers would count; False leaves
            them as they are, as in the paper.

    Source:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, equation 3.
    """
    student, teacher = _pair(student, teacher)
    values = mx.square(student - teacher).mean(axis=-1)
    return values / _size(teacher) if relative else values


def hidden_cosine(
    student: Float[mx.array, "... D"], teacher: Float[mx.array, "... D"]
) -> Float[mx.array, "..."]:
    """Return 1 - cosine."""
    student, teacher = map(normalise, _pair(student, teacher))
    return 1 - (student * teacher).sum(axis=-1)


def patient_kd(
    student: Float[mx.array, "... D"], teacher: Float[mx.array, "... D"]
) -> Float[mx.array, "..."]:
    """Return the squared distance of normalised features.

    Source:
        Sun et al. 2019, arXiv:1908.09355, equation 7, where it is applied to the first token.
    """
    student, teacher = map(normalise, _pair(student, teacher))
    return mx.square(student - teacher).sum(axis=-1)


def attention_transfer(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *S U"]
) -> Float[mx.array, "B ..."]:
    """Return the squared differences of normalised attention maps.

    The map of an image is the mean over channels of the squared features; the channels' number
    may differ. MLX keeps channels last.

    Source:
        Zagoruyko and Komodakis 2017, arXiv:1612.03928, equation 2, with p = 2.
    """
    ours, theirs = (
        normalise(mx.square(x).mean(axis=-1).reshape(x.shape[0], -1))
        for x in _pair(student, teacher)
    )
    return mx.square(ours - theirs).reshape(student.shape[:-1])


def normalise(x: Float[mx.array, "... D"]) -> Float[mx.array, "... D"]:
    """Return rows of length one; a row of zeros stays one, and has a finite gradient."""
    return x * mx.rsqrt(mx.maximum(mx.square(x).sum(axis=-1, keepdims=True), 1e-24))


def _pair(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    return student.astype(mx.float32), mx.stop_gradient(teacher).astype(mx.float32)


def _size(teacher: mx.array) -> mx.array:
    return mx.maximum(mx.square(teacher).mean(axis=-1), 1e-12)
