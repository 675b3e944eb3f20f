"""Distillation losses against slow twins and finite differences, and their properties."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from test_golden_losses import value

from mlx_distill.arrays import log_probs
from mlx_distill.losses import acceptance, feature, relation, response

# ------------------------------------------------------------------------------------- gradients


def random(*shape: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return mx.array(values.astype(np.float32))


LABELS = mx.array([[0, 3, 2], [4, 5, 1]])


TOP_IDS = mx.array([[[0, 2], [1, 3], [4, 5]], [[5, 1], [2, 0], [3, 4]]])


TOP_LOG_PROBS = mx.log(mx.array([0.6, 0.3]) * mx.ones((2, 3, 1)))


LOGITS = random(2, 3, 6, seed=1)


IMAGES = random(4, 2, 2, 3, seed=1)


def normalised(loss: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a loss of log-probabilities as one of logits."""
    return lambda s, t, *rest: loss(log_probs(s), log_probs(t), *rest)


ANSWERS: dict[str, Callable[..., mx.array]] = {
    "forward_kl": response.forward_kl,
    "soft_cross_entropy": response.soft_cross_entropy,
    "logit_mse": response.logit_mse,
    "reverse_kl": normalised(response.reverse_kl),
    "jensen_shannon": normalised(response.jensen_shannon),
    "skew_forward_kl": normalised(response.skew_forward_kl),
    "skew_reverse_kl": normalised(response.skew_reverse_kl),
    "total_variation": normalised(acceptance.total_variation),
    "sorted_l1": normalised(response.sorted_l1),
    "decoupled_kd": lambda s, t: normalised(response.decoupled_kd)(
        s, t, mx.zeros(s.shape[:-1], mx.int32)
    ),
}


DIFFERENTIABLE: dict[str, tuple[tuple[int, ...], Callable[[mx.array], mx.array]]] = {
    **{name: ((2, 3, 6), lambda s, loss=loss: loss(s, LOGITS)) for name, loss in ANSWERS.items()},
    "hard_labels": ((2, 3, 6), lambda s: response.hard_labels(log_probs(s), LABELS)),
    "wider sorted_l1": ((2, 3, 5), lambda s: ANSWERS["sorted_l1"](s, LOGITS)),
    "hidden_mse": ((2, 3, 6), lambda s: feature.hidden_mse(s, LOGITS)),
    "raw hidden_mse": ((2, 3, 6), lambda s: feature.hidden_mse(s, LOGITS, relative=False)),
    "hidden_cosine": ((2, 3, 6), lambda s: feature.hidden_cosine(s, LOGITS)),
    "patient_kd": ((2, 3, 6), lambda s: feature.patient_kd(s, LOGITS)),
    "attention_transfer": ((4, 2, 2, 5), lambda s: feature.attention_transfer(s, IMAGES)),
    "flow_of_solution": (
        (4, 2, 2, 3),
        lambda s: relation.flow_of_solution((s, s[..., :2]), (IMAGES, IMAGES[..., 1:])),
    ),
    "similarity_preserving": ((4, 5), lambda s: relation.similarity_preserving(s, IMAGES)),
    "relational_distance": ((4, 5), lambda s: relation.relational_distance(s, IMAGES)),
    "relational_angle": ((4, 5), lambda s: relation.relational_angle(s, IMAGES)),
    "probabilistic_transfer": (
        (4, 5),
        lambda s: 4 * relation.probabilistic_transfer(s, IMAGES),
    ),
    "neuron_selectivity": ((4, 2, 2, 5), lambda s: relation.neuron_selectivity(s, IMAGES)),
    "contrastive": ((4, 6), lambda s: relation.contrastive(s, random(4, 6, seed=3), 100)),
    **{
        f"sparse_kl {tail}": (
            (2, 3, 6),
            lambda s, tail=tail: response.sparse_kl(
                log_probs(s), TOP_IDS, TOP_LOG_PROBS, tail, LOGITS[0, 0]
            ),
        )
        for tail in ("bucket", "teacher", "both", "prior")
    },
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name: str) -> None:
    shape, loss = DIFFERENTIABLE[name]
    student = random(*shape, seed=7)
    found = np.array(mx.grad(lambda s: loss(s).sum())(student))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 1e-4
    random_places = np.random.default_rng(0).permutation(student.size)[:12]
    for place in random_places:
        step = np.zeros(student.size, np.float32)
        step[place] = 2e-3
        nudge = mx.array(step.reshape(shape))
        ends = [loss(student + sign * nudge).sum().item() for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 4e-3  # pyright: ignore[reportOperatorIssue]
        assert found.ravel()[place] == pytest.approx(slope, abs=5e-3, rel=2e-2)


@pytest.mark.parametrize(
    "loss", [*ANSWERS.values(), feature.hidden_mse, feature.hidden_cosine, feature.patient_kd]
)
def test_teacher_gets_no_gradient(loss: Callable[..., mx.array]) -> None:
    student = random(2, 3, 6, seed=7)
    gradient = mx.grad(lambda teacher: loss(student, teacher).sum())(LOGITS)
    assert mx.abs(gradient).max().item() == 0


# ------------------------------------------------------------------------------------ properties


DIVERGENCES = ANSWERS.keys() - {"soft_cross_entropy", "logit_mse"}


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_are_zero_between_equals_and_positive_otherwise(name: str) -> None:
    student = random(2, 3, 6, seed=7)
    assert abs(value(ANSWERS[name](LOGITS, LOGITS))) < 1e-6
    assert value(ANSWERS[name](student, LOGITS)) > 1e-3


@pytest.mark.parametrize("name", sorted(DIVERGENCES | {"soft_cross_entropy"}))
def test_a_constant_added_to_logits_changes_nothing(name: str) -> None:
    student, loss = random(2, 3, 6, seed=7), ANSWERS[name]
    shifted = value(loss(student + 40, LOGITS - 25))
    assert shifted == pytest.approx(value(loss(student, LOGITS)), rel=1e-3)


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_position_has_its_own_value(name: str) -> None:
    """One of its neighbours may be no number."""
    student, loss = random(2, 3, 6, seed=7), ANSWERS[name]
    learned = mx.array([[1, 0, 1], [0, 0, 1]]) > 0
    spoilt = mx.where(learned[..., None], student, mx.nan)
    rows = mx.array([0, 2, 5])
    expected = loss(student.reshape(6, 6)[rows], LOGITS.reshape(6, 6)[rows])
    np.testing.assert_allclose(loss(spoilt, LOGITS).reshape(-1)[rows], expected, rtol=1e-5)


def exact_kl(student: mx.array, teacher: mx.array, temperature: float) -> float:
    s, t = (np.array(x, np.float64) / temperature for x in (student, teacher))
    s, t = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (s, t))
    return temperature**2 * (np.exp(t) * (t - s)).sum(-1).mean()


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 8.0])
def test_forward_kl_on_logits_as_real_models_have_them(noise: float, temperature: float) -> None:
    """The best of 49,152 is at +29, the mean at 9; once, equals were 0.0016 apart."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((4, 49152)) * 3 + np.eye(4, 49152) * 20 + 9
    teacher = mx.array(logits.astype(np.float32))
    student = teacher + noise * mx.array(random.standard_normal(logits.shape).astype(np.float32))
    found = temperature**2 * response.forward_kl(student / temperature, teacher / temperature)
    expected = exact_kl(student, teacher, temperature)
    assert found.mean().item() == pytest.approx(expected, abs=2e-5, rel=2e-5)
    if noise == 0:
        assert mx.abs(found).max().item() == 0


def test_the_student_may_be_sure_of_another_token() -> None:
    """A thousand nats are a number, too."""
    teacher, student = mx.array([[1000.0, 0, 0]]), mx.array([[0.0, 1000, 0]])
    value, gradient = mx.value_and_grad(lambda s: response.forward_kl(s, teacher).sum())(student)
    assert value.item() == pytest.approx(1000)
    np.testing.assert_allclose(gradient, [[-1, 1, 0]])


BARRED = mx.where(mx.arange(6) < 2, -mx.inf, LOGITS)


@pytest.mark.parametrize("name", sorted(ANSWERS.keys() - {"reverse_kl"}))
@pytest.mark.parametrize("both", [False, True])
def test_tokens_that_are_barred(name: str, both: bool) -> None:
    """Where the teacher has no mass, it adds nothing; the others are as they were without."""
    student = random(2, 3, 6, seed=7)
    student = mx.where(mx.arange(6) < 2, -mx.inf, student) if both else student
    labels = mx.full((2, 3), 4)
    loss = ANSWERS[name]
    if name == "decoupled_kd":
        loss = lambda s, t: normalised(response.decoupled_kd)(s, t, labels)  # noqa: E731
    total, gradient = mx.value_and_grad(lambda s: loss(s, BARRED).sum())(student)
    assert mx.isfinite(total).item()
    assert mx.isfinite(gradient).all().item()
    if both:
        if name == "decoupled_kd":
            labels = labels - 2
        assert total.item() == pytest.approx(
            loss(student[..., 2:], BARRED[..., 2:]).sum().item(), rel=1e-5
        )
        assert not gradient[..., :2].any().item()


def test_the_reverse_divergence_is_infinite_where_the_teacher_bars_and_the_student_does_not() -> (
    None
):
    student = random(2, 3, 6, seed=7)
    values = ANSWERS["reverse_kl"](student, BARRED)
    assert (values == mx.inf).all().item()
    cut = mx.where(mx.arange(6) < 2, -mx.inf, student)
    total, gradient = mx.value_and_grad(lambda s: ANSWERS["reverse_kl"](s, BARRED).sum())(cut)
    assert mx.isfinite(total).item()
    assert mx.isfinite(gradient).all().item()


@pytest.mark.parametrize("tail", ["bucket", "prior"])
def test_a_teacher_without_a_tail_and_a_student_that_bars_it(tail: str) -> None:
    """Zero times infinity is not a number."""
    student = mx.array([[0.0, 1, -mx.inf, -mx.inf]])
    ids, known = mx.array([[0, 1]]), mx.log(mx.array([[0.5, 0.5]]))
    prior = mx.log(mx.full((4,), 0.25))

    def loss(x: mx.array) -> mx.array:
        return response.sparse_kl(log_probs(x), ids, known, tail, prior).sum()

    total, gradient = mx.value_and_grad(loss)(student)
    odds = np.log([1 / (1 + np.e), np.e / (1 + np.e)])
    assert total.item() == pytest.approx(-np.log(2) - odds.mean())
    np.testing.assert_allclose(gradient, [[1 / (1 + np.e) - 0.5, np.e / (1 + np.e) - 0.5, 0, 0]])


def test_one_class_can_not_be_wrong() -> None:
    one = mx.array([[2.0], [-1.0]])
    labels = mx.zeros((2,), mx.int32)
    loss = normalised(response.decoupled_kd)
    total, gradient = mx.value_and_grad(lambda s: loss(s, one, labels).sum())(one + 3)
    assert total.item() == 0
    assert not gradient.any().item()


def test_a_part_of_decoupled_kd_without_a_weight_is_left_out() -> None:
    """Where the student bars the label, or another that the teacher allows, 0 times it was NaN."""
    labels, teacher = mx.array([0]), mx.log(mx.array([[0.5, 0.3, 0.2]]))
    loss = normalised(response.decoupled_kd)
    barred = mx.array([[-mx.inf, 0.0, 0.0]])
    among = loss(barred, teacher, labels, 0.0, 1.0).item()
    expected = 0.6 * np.log(0.6 / 0.5) + 0.4 * np.log(0.4 / 0.5)
    np.testing.assert_allclose(among, expected, rtol=1e-5)
    barred = mx.array([[0.0, 0.0, -mx.inf]])
    alone = loss(barred, teacher, labels, 1.0, 0.0).item()
    np.testing.assert_allclose(alone, 0.0, atol=1e-6)


def test_sparse_kl_of_all_tokens_is_the_whole_divergence() -> None:
    student = random(2, 3, 6, seed=7)
    known, ours = log_probs(LOGITS), log_probs(student)
    ids = mx.broadcast_to(mx.arange(6), (2, 3, 6))
    expected = value(response.forward_kl(student, LOGITS))
    for tail in ("teacher", "both"):
        found = value(response.sparse_kl(ours, ids, known, tail))
        assert found == pytest.approx(expected, rel=1e-5)
    # One token less, and the bucket holds exactly that one.
    found = response.sparse_kl(ours, ids[..., :5], known[..., :5])
    assert value(found) == pytest.approx(expected, rel=1e-4)


def test_the_bucket_is_never_more_than_the_whole_divergence() -> None:
    student = random(2, 3, 6, seed=7)
    known, ours = log_probs(LOGITS), log_probs(student)
    ids = mx.argsort(-known, axis=-1)
    whole = value(response.forward_kl(student, LOGITS))
    tops = [(ids[..., :k], mx.take_along_axis(known, ids[..., :k], axis=-1)) for k in range(1, 6)]
    found = [value(response.sparse_kl(ours, *top)) for top in tops]
    assert found == sorted(found)
    assert found[-1] <= whole * (1 + 1e-5)


def test_sorted_l1_takes_vocabularies_of_different_sizes() -> None:
    student = random(2, 3, 9, seed=7)
    found = value(ANSWERS["sorted_l1"](student, LOGITS))
    p, q = (-np.sort(-np.array(mx.softmax(x, axis=-1)), axis=-1) for x in (LOGITS, student))
    p = np.pad(p, [(0, 0), (0, 0), (0, 3)])
    assert found == pytest.approx(np.abs(p - q).sum(-1).mean(), rel=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher = (40 * random(64, 500, seed=seed) for seed in (1, 2))
    exact = value(response.forward_kl(student, teacher))
    half = response.forward_kl(student.astype(mx.float16), teacher.astype(mx.float16))
    assert value(half) == pytest.approx(exact, rel=1e-2)


def test_relations_do_not_depend_on_rotation_or_width() -> None:
    teacher = np.random.default_rng(0).normal(size=(6, 4))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0][:4]
    student = mx.array((3 * teacher @ rotation).astype(np.float32))
    for loss in (
        relation.relational_distance,
        relation.relational_angle,
        relation.similarity_preserving,
        relation.probabilistic_transfer,
    ):
        assert abs(value(loss(student, mx.array(teacher.astype(np.float32))))) < 1e-5


@pytest.mark.parametrize("loss", [relation.relational_distance, relation.relational_angle])
def test_equal_examples_have_a_finite_gradient(loss: Callable[..., mx.array]) -> None:
    student = mx.concatenate([random(1, 5), random(1, 5), random(2, 5)])
    gradient = mx.grad(lambda s: loss(s, IMAGES).sum())(student)
    assert mx.isfinite(gradient).all().item()


def test_contrastive_equals_its_definition() -> None:
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2)
    s, t = (np.array(x / mx.linalg.norm(x, axis=-1, keepdims=True)) for x in (student, teacher))
    e = np.exp(s @ t.T / 0.2)
    h = e / (e + 4 / 1000)
    pairs = np.eye(5, dtype=bool)
    expected = -(np.log(h[pairs]).sum() + np.log(1 - h[~pairs]).sum()) / 5
    found = value(relation.contrastive(student, teacher, 1000, 0.2))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: response.jensen_shannon(LOGITS, LOGITS, 0.0), "beta must be between"),
        (lambda: response.skew_forward_kl(LOGITS, LOGITS, 1.0), "alpha must be at least 0"),
        (
            lambda: response.sparse_kl(LOGITS, TOP_IDS, TOP_LOG_PROBS, "none"),
            "tail must be bucket, teacher, both or prior, got none",
        ),
        (
            lambda: relation.contrastive(LOGITS[0, :1], LOGITS[0, :1], 10),
            "needs at least 2 examples, got 1",
        ),
        (
            lambda: relation.flow_of_solution((IMAGES, IMAGES), (IMAGES, IMAGES[..., :2])),
            "widths must be the teacher's",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], mx.array], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_tail_of_the_prior_is_the_divergence_from_both_together() -> None:
    mx.random.seed(5)
    log_prior, student = mx.random.normal((7,)), mx.random.normal((2, 7))
    ids = mx.array([[0, 2, 5], [6, 1, 4]])
    top = mx.log(mx.array([[0.5, 0.2, 0.1], [0.3, 0.3, 0.3]]))
    probs = np.tile(np.exp(np.array(log_prior, np.float64)), (2, 1))
    np.put_along_axis(probs, np.array(ids), 0, axis=1)
    probs *= (1 - np.exp(np.array(top, np.float64)).sum(1))[:, None] / probs.sum(1)[:, None]
    np.put_along_axis(probs, np.array(ids), np.exp(np.array(top, np.float64)), axis=1)
    logits = np.array(student, np.float64)
    known = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = (probs * (np.log(probs) - known)).sum()
    found = response.sparse_kl(log_probs(student), ids, top, "prior", log_prior)
    assert found.sum().item() == pytest.approx(expected, rel=1e-5)


def test_equal_examples_are_a_pair_like_others() -> None:
    """Park et al. 2019, equation 7: the mean distance is that of all pairs i != j."""
    random = np.random.default_rng(0)
    student, teacher = (random.standard_normal((5, 4)) for _ in range(2))
    student[1], teacher[1] = student[0], teacher[0]

    def distances(x: np.ndarray) -> np.ndarray:
        found = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
        return found / found[~np.eye(len(x), dtype=bool)].mean()

    apart = np.abs(distances(student) - distances(teacher))
    expected = np.where(apart < 1, 0.5 * apart**2, apart - 0.5).mean()
    found = relation.relational_distance(
        mx.array(student.astype(np.float32)), mx.array(teacher.astype(np.float32))
    )
    assert value(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_features_are_compared_in_the_teachers_units(scale: float) -> None:
    student, teacher = scale * random(2, 3, 6, seed=7), scale * LOGITS
    expected = value(feature.hidden_mse(random(2, 3, 6, seed=7), LOGITS))
    assert value(feature.hidden_mse(student, teacher)) == pytest.approx(expected, rel=1e-4)
    assert value(feature.hidden_mse(0 * student, teacher)) == pytest.approx(1)
    flows = [(x, x[..., :2]) for x in (scale * random(4, 2, 2, 3, seed=5), scale * IMAGES)]
    plain = [(x, x[..., :2]) for x in (random(4, 2, 2, 3, seed=5), IMAGES)]
    expected = value(relation.flow_of_solution(*plain))
    assert value(relation.flow_of_solution(*flows)) == pytest.approx(expected, rel=1e-4)
