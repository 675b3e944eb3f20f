"""Losses on how examples, or layers, relate to each other: ``(sum, count)`` in float32.

They compare matrices that do not depend on the networks' widths, so no projection is needed. B is
the number of examples in a batch. The gradient reaches the student only.
"""

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.losses.feature import normalise
from mlx_distill.losses.response import Loss


def flow_of_solution(
    student: tuple[Float[mx.array, "B *S C"], Float[mx.array, "B *S E"]],
    teacher: tuple[Float[mx.array, "B *R U"], Float[mx.array, "B *R V"]],
) -> Loss:
    """Return the sum of squared differences of two layers' inner products, and their entries.

    G = F1^T F2 / S for the features of two layers at S places: pixels, or tokens of a text.

    Args:
        student: Features of an earlier and a later layer, channels last.
        teacher: The same of the teacher, with as many channels.

    Raises:
        ValueError: If the teacher's and the student's channels differ in number.

    Source:
        Yim et al. 2017, A Gift from Knowledge Distillation, CVPR, equations 1 and 2.
    """

    def inner(layers: tuple[mx.array, mx.array]) -> mx.array:
        first, second = (x.astype(mx.float32).reshape(x.shape[0], -1, x.shape[-1]) for x in layers)
        return first.swapaxes(1, 2) @ second / first.shape[1]

    ours, theirs = inner(student), mx.stop_gradient(inner(teacher))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the layers' widths must be the teacher's, got {ours.shape[1:]} and {theirs.shape[1:]}"
        )
    return _mean_square(ours - theirs)


def similarity_preserving(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Loss:
    """Return the sum of squared differences of normalised similarity matrices, and B^2.

    Source:
        Tung and Mori 2019, arXiv:1907.09682, equations 3 and 4.
    """
    ours, theirs = _flat(student), mx.stop_gradient(_flat(teacher))
    return _mean_square(normalise(ours @ ours.T) - normalise(theirs @ theirs.T))


def relational_distance(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Loss:
    """Return the sum of Huber losses of pairwise distances, and B^2.

    Distances are measured in units of the batch's mean distance.

    Source:
        Park et al. 2019 (RKD), arXiv:1904.05068, equations 6 and 7.
    """
    ours, theirs = (_relative_distances(_flat(x)) for x in (student, teacher))
    return _huber(ours - mx.stop_gradient(theirs))


def relational_angle(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Loss:
    """Return the sum of Huber losses of the cosines of all angles, and B^3.

    Source:
        Park et al. 2019 (RKD), arXiv:1904.05068, equations 8 and 9.
    """
    ours, theirs = (_angles(_flat(x)) for x in (student, teacher))
    return _huber(ours - mx.stop_gradient(theirs))


def probabilistic_transfer(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"], eps: float = 1e-7
) -> Loss:
    """Return the sum of p log(p / q) for the neighbourhoods of the examples, and B^2.

    p and q say how probable each example is as another's neighbour, by the cosine of the features.

    Args:
        student: Features.
        teacher: Features.
        eps: Keeps logarithms finite.

    Source:
        Passalis and Tefas 2018, arXiv:1803.10837, equations 4 to 8.
    """
    ours, theirs = (_neighbourhoods(_flat(x)) for x in (student, teacher))
    theirs = mx.stop_gradient(theirs)
    values = theirs * mx.log((theirs + eps) / (ours + eps))
    return values.sum(), mx.array(values.size, mx.float32)


def neuron_selectivity(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *S U"]
) -> Loss:
    """Return the sum of squared MMDs of the channels' maps with k(x, y) = (x.y)^2, and B.

    Source:
        Huang and Wang 2017, arXiv:1707.01219, equation 5.
    """

    def maps(x: mx.array) -> mx.array:
        return normalise(x.astype(mx.float32).reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2))

    def kernel(x: mx.array, y: mx.array) -> mx.array:
        return mx.square(x @ y.swapaxes(1, 2)).mean(axis=(1, 2))

    ours, theirs = maps(student), mx.stop_gradient(maps(teacher))
    values = kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)
    return values.sum(), mx.array(values.size, mx.float32)


def contrastive(
    student: Float[mx.array, "B D"],
    teacher: Float[mx.array, "B D"],
    num_examples: int,
    temperature: float = 0.1,
) -> Loss:
    """Return the sum over examples of the contrastive loss, and B.

    The student's and the teacher's embedding of one example are a pair; those of two different
    examples of the batch are none. A critic h = e / (e + N / M), e = exp(cosine / temperature), N
    the pairs that are none per pair that is, M the number of examples there are, tells them apart.

    Args:
        student: Embeddings, after a learned projection.
        teacher: Embeddings.
        num_examples: Size of the training set.
        temperature: Of the critic.

    Raises:
        ValueError: If there is but one example: there is nothing to tell it from.

    Source:
        Tian et al. 2020 (CRD), arXiv:1910.10699, equations 9 to 11 and 19.
    """
    batch = student.shape[0]
    if batch < 2:
        raise ValueError(f"a contrastive loss needs at least 2 examples, got {batch}")
    cosines = (
        normalise(student.astype(mx.float32))
        @ normalise(mx.stop_gradient(teacher).astype(mx.float32)).T
    )
    # log h = -log(1 + c / e) and log(1 - h) = -log(1 + e / c), with c = N / M.
    logit = cosines / temperature - mx.log((batch - 1) / mx.array(num_examples, mx.float32))
    pair = mx.eye(batch) > 0
    values = mx.logaddexp(mx.where(pair, -logit, logit), 0.0)
    return values.sum(), mx.array(batch, mx.float32)


def _flat(x: mx.array) -> mx.array:
    return x.astype(mx.float32).reshape(x.shape[0], -1)


def _relative_distances(x: mx.array) -> mx.array:
    """Return pairwise distances over their mean, which equal examples do not enter."""
    squares = mx.square(x[:, None] - x[None]).sum(axis=-1)
    apart = squares > 0
    # The root has no gradient at zero: equal examples keep a distance of zero without it.
    distances = mx.where(apart, mx.sqrt(mx.where(apart, squares, 1)), 0)
    return distances / mx.maximum(distances.sum() / mx.maximum(apart.sum(), 1), 1e-12)


def _angles(x: mx.array) -> mx.array:
    """Return, (B, B, B), the cosine of the angle at example i between examples j and k."""
    towards = normalise(x[None] - x[:, None])
    return towards @ towards.swapaxes(1, 2)


def _neighbourhoods(x: mx.array) -> mx.array:
    x = normalise(x)
    near = (x @ x.T + 1) / 2
    return near / near.sum(axis=1, keepdims=True)


def _huber(difference: mx.array) -> Loss:
    size = mx.abs(difference)
    values = mx.where(size < 1, 0.5 * mx.square(difference), size - 0.5)
    return values.sum(), mx.array(values.size, mx.float32)


def _mean_square(difference: mx.array) -> Loss:
    return mx.square(difference).sum(), mx.array(difference.size, mx.float32)
