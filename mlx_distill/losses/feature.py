"""Losses on what networks compute inside: arrays in, ``(sum, count)`` in float32 out.

Student and teacher arrays have the same width; where the networks' widths differ, a learned
projection comes first (see ``Hints``). The gradient reaches the student only.
"""

import mlx.core as mx
from jaxtyping import Float, Shaped

from mlx_distill.losses.response import Loss


def hidden_mse(
    student: Float[mx.array, "... D"],
    teacher: Float[mx.array, "... D"],
    mask: Shaped[mx.array, "..."] | None = None,
) -> Loss:
    """Return the sum of squared differences, and the number of entries.

    Args:
        student: Features, of a token or an image.
        teacher: The same of the teacher.
        mask: Weight of every position, without the last axis; None for one each.

    Source:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, equation 3.
    """
    student, teacher = _pair(student, teacher)
    weights = _weights(student, mask)
    squares = mx.square(student - teacher).sum(axis=-1)
    return _total(squares, weights)[0], weights.sum() * student.shape[-1]


def hidden_cosine(
    student: Float[mx.array, "... D"],
    teacher: Float[mx.array, "... D"],
    mask: Shaped[mx.array, "..."] | None = None,
) -> Loss:
    """Return the sum of 1 - cosine, and the number of positions; see ``hidden_mse``."""
    student, teacher = map(normalise, _pair(student, teacher))
    return _total(1 - (student * teacher).sum(axis=-1), _weights(student, mask))


def patient_kd(
    student: Float[mx.array, "... D"],
    teacher: Float[mx.array, "... D"],
    mask: Shaped[mx.array, "..."] | None = None,
) -> Loss:
    """Return the sum of squared distances of normalised features, and the number of positions.

    Source:
        Sun et al. 2019, arXiv:1908.09355, equation 7, where it is applied to the first token.
    """
    student, teacher = map(normalise, _pair(student, teacher))
    return _total(mx.square(student - teacher).sum(axis=-1), _weights(student, mask))


def attention_transfer(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *S U"]
) -> Loss:
    """Return the sum of squared differences of normalised attention maps, and their entries.

    The map of an image is the mean over channels of the squared features; the channels' number
    may differ. MLX keeps channels last.

    Source:
        Zagoruyko and Komodakis 2017, arXiv:1612.03928, equation 2, with p = 2.
    """
    student, teacher = _pair(student, teacher)
    maps = [
        normalise(mx.square(x).mean(axis=-1).reshape(x.shape[0], -1)) for x in (student, teacher)
    ]
    squares = mx.square(maps[0] - maps[1])
    return squares.sum(), mx.array(squares.size, mx.float32)


def normalise(x: Float[mx.array, "... D"]) -> Float[mx.array, "... D"]:
    """Return rows of length one; a row of zeros stays one, and has a finite gradient."""
    return x * mx.rsqrt(mx.maximum(mx.square(x).sum(axis=-1, keepdims=True), 1e-24))


def _pair(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    return student.astype(mx.float32), mx.stop_gradient(teacher).astype(mx.float32)


def _weights(x: mx.array, mask: mx.array | None) -> mx.array:
    return mx.ones(x.shape[:-1]) if mask is None else mask.astype(mx.float32)


def _total(values: mx.array, weights: mx.array) -> Loss:
    return mx.where(weights > 0, values * weights, 0).sum(), weights.sum()
