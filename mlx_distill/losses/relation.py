"""Losses on how examples, or layers, relate to each other: one value per example, in float32.

They compare matrices that do not depend on the networks' widths, so no projection is needed. B is
the number of examples in a batch. The gradient reaches the student only.
"""

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.losses.feature import normalise


def flow_of_solution(
    student: tuple[Float[mx.array, "B *S C"], Float[mx.array, "B *S E"]],
    teacher: tuple[Float[mx.array, "B *R U"], Float[mx.array, "B *R V"]],
    relative: bool = True,
) -> Float[mx.array, " B"]:
    """Return the mean squared difference of two layers' inner products.

    G = F1^T F2 / S for the features of two layers at S places: pixels, or tokens of a text.

    Args:
        student: Features of an earlier and a later layer, channels last.
        teacher: The same of the teacher, with as many channels.
        relative: In units of the mean square of the teacher's products, as in
            ``feature.hidden_mse``; False leaves them as they are, as in the paper.

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
    values = mx.square(ours - theirs).mean(axis=(1, 2))
    size = mx.maximum(mx.square(theirs).mean(axis=(1, 2)), 1e-12)
    return values / size if relative else values


def similarity_preserving(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Float[mx.array, " B"]:
    """Return the mean squared difference of the rows of normalised similarity matrices.

    Source:
        Tung and Mori 2019, arXiv:1907.09682, equations 3 and 4.
    """
    ours, theirs = _flat(student), mx.stop_gradient(_flat(teacher))
    return mx.square(normalise(ours @ ours.T) - normalise(theirs @ theirs.T)).mean(axis=-1)


def relational_distance(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Float[mx.array, " B"]:
    """Return the mean Huber loss of an example's distances from all, itself among them.

    Distances are measured in units of the batch's mean distance, of all pairs of two examples.

    Source:
        Park et al. 2019 (RKD), arXiv:1904.05068, equations 6 and 7.
    """
    ours, theirs = (_relative_distances(_flat(x)) for x in (student, teacher))
    return _huber(ours - mx.stop_gradient(theirs)).mean(axis=-1)


def relational_angle(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"]
) -> Float[mx.array, " B"]:
    """Return the mean Huber loss of the cosines of all angles at an example.

    Source:
        Park et al. 2019 (RKD), arXiv:1904.05068, equations 8 and 9.
    """
    ours, theirs = (_angles(_flat(x)) for x in (student, teacher))
    return _huber(ours - mx.stop_gradient(theirs)).mean(axis=(1, 2))


def probabilistic_transfer(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *R U"], eps: float = 1e-7
) -> Float[mx.array, " B"]:
    """Return the mean of p log(p / q) over an example's neighbourhood.

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
    return (theirs * mx.log((theirs + eps) / (ours + eps))).mean(axis=-1)


def neuron_selectivity(
    student: Float[mx.array, "B *S C"], teacher: Float[mx.array, "B *S U"]
) -> Float[mx.array, " B"]:
    """Return the squared MMD of the channels' maps with k(x, y) = (x.y)^2.

    Source:
        Huang and Wang 2017, arXiv:1707.01219, equation 5.
    """

    def maps(x: mx.array) -> mx.array:
        return normalise(x.astype(mx.float32).reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2))

    def kernel(x: mx.array, y: mx.array) -> mx.array:
        return mx.square(x @ y.swapaxes(1, 2)).mean(axis=(1, 2))

    ours, theirs = maps(student), mx.stop_gradient(maps(teacher))
    return kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)


def contrastive(
    student: Float[mx.array, "B D"],
    teacher: Float[mx.array, "B D"],
    num_examples: int,
    temperature: float = 0.1,
) -> Float[mx.array, " B"]:
    """Return the contrastive loss of each example.

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
    return mx.logaddexp(mx.where(pair, -logit, logit), 0.0).sum(axis=-1)


def _flat(x: mx.array) -> mx.array:
    return x.astype(mx.float32).reshape(x.shape[0], -1)


def _relative_distances(x: mx.array) -> mx.array:
    """Return pairwise distances over the mean of those between two examples."""
    squares = mx.square(x[:, None] - x[None]).sum(axis=-1)
    apart = squares > 0
    # The root has no gradient at zero: equal examples keep a distance of zero without it.
    distances = mx.where(apart, mx.sqrt(mx.where(apart, squares, 1)), 0)
    pairs = x.shape[0] * (x.shape[0] - 1)
    return distances / mx.maximum(distances.sum() / max(pairs, 1), 1e-12)


def _angles(x: mx.array) -> mx.array:
    """Return, (B, B, B), the cosine of the angle at example i between examples j and k."""
    towards = normalise(x[None] - x[:, None])
    return towards @ towards.swapaxes(1, 2)


def _neighbourhoods(x: mx.array) -> mx.array:
    x = normalise(x)
    near = (x @ x.T + 1) / 2
    return near / near.sum(axis=1, keepdims=True)


def _huber(difference: mx.array) -> mx.array:
    size = mx.abs(difference)
    return mx.where(size < 1, 0.5 * mx.square(difference), size - 0.5)
