"""Distillation losses against published values, slow twins, finite differences and properties."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.losses import feature, relation, response
from mlx_distill.losses.response import Loss


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "oracles" / "losses.json").read_text())


def closed_form(shape: list[int], a: float, b: float) -> np.ndarray:
    """Return the golden values' inputs."""
    n = int(np.prod(shape))
    i = np.arange(n)
    return (2 * np.sin(a * i + b) + 0.5 * np.cos(0.37 * a * i**2 / n)).reshape(shape)


def inputs(golden: dict[str, Any]) -> dict[str, mx.array]:
    """Return the arrays that the golden losses are computed on; images with channels last."""
    arrays = {}
    for name, value in golden["inputs"].items():
        if isinstance(value, list):
            arrays[name] = mx.array(value)
            continue
        array = closed_form(value["shape"], value["a"], value["b"])
        if array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        arrays[name] = mx.array(array.astype(np.float32))
    arrays["labelled"] = (arrays["labels"] != -100).astype(mx.float32)
    arrays["rows"] = mx.ones((6,))
    return arrays


def top3(x: dict[str, mx.array], tail: Any) -> Loss:
    log_probs = x["teacher_logits"] - mx.logsumexp(x["teacher_logits"], axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)[..., :3]
    known = mx.take_along_axis(log_probs, ids, axis=-1)
    return response.sparse_kl(x["student_logits"], ids, known, x["labelled"], tail)


def on_tokens(loss: Callable[..., Loss], **options: Any) -> Callable[[dict[str, mx.array]], Loss]:
    return lambda x: loss(x["student_logits"], x["teacher_logits"], x["labelled"], **options)


def on_rows(loss: Callable[..., Loss], **options: Any) -> Callable[[dict[str, mx.array]], Loss]:
    return lambda x: loss(x["ys"], x["yt"], x["rows"], **options)


def on_images(loss: Callable[..., Loss]) -> Callable[[dict[str, mx.array]], Loss]:
    return lambda x: loss(x["fs4"], x["ft4"])


def decoupled(**options: Any) -> Callable[[dict[str, mx.array]], Loss]:
    return lambda x: response.decoupled_kd(x["ys"], x["yt"], x["y"], x["rows"], **options)


GOLDEN: dict[str, Callable[[dict[str, mx.array]], Loss]] = {
    "forward_kl": on_tokens(response.forward_kl),
    "reverse_kl": on_tokens(response.reverse_kl),
    "jensen_shannon_beta_0.1": on_tokens(response.jensen_shannon, beta=0.1),
    "jensen_shannon_beta_0.5": on_tokens(response.jensen_shannon, beta=0.5),
    "jensen_shannon_beta_0.9": on_tokens(response.jensen_shannon, beta=0.9),
    "jensen_shannon_beta_0.5_T_2_unscaled": on_tokens(
        response.jensen_shannon, temperature=2.0, scaled=False
    ),
    "total_variation": on_tokens(response.total_variation),
    "skew_forward_kl_alpha_0.1": on_tokens(response.skew_forward_kl, alpha=0.1),
    "skew_reverse_kl_alpha_0.1": on_tokens(response.skew_reverse_kl, alpha=0.1),
    "kl_T_2_scaled": on_tokens(response.forward_kl, temperature=2.0),
    "hinton_kd_T_4": on_rows(response.forward_kl, temperature=4.0),
    "soft_cross_entropy_T_2_unscaled": on_rows(
        response.soft_cross_entropy, temperature=2.0, scaled=False
    ),
    "logit_mse_T_2": on_rows(response.logit_mse, temperature=2.0),
    "dkd_alpha_1_beta_8_T_4": decoupled(temperature=4.0),
    "top3_forward_kl_teacher_renormalised": lambda x: top3(x, "teacher"),
    "top3_forward_kl_tail_bucket": lambda x: top3(x, "bucket"),
    "top3_forward_kl_both_renormalised": lambda x: top3(x, "both"),
    "uld_sorted_l1": on_tokens(response.sorted_l1),
    "hint_mse": on_images(feature.hidden_mse),
    "attention_transfer_p_2": on_images(feature.attention_transfer),
    "hidden_mse_masked": lambda x: feature.hidden_mse(x["hs"], x["ht"], x["mask"]),
    "hidden_cosine_masked": lambda x: feature.hidden_cosine(x["hs"], x["ht"], x["mask"]),
    "pkd_first_token": lambda x: feature.patient_kd(x["hs"][:, 0], x["ht"][:, 0]),
    # The relations between examples see the features in the order of the golden inputs.
    "similarity_preserving": on_images(relation.similarity_preserving),
    "rkd_distance": on_images(relation.relational_distance),
    "rkd_angle": on_images(relation.relational_angle),
    "pkt": on_images(relation.probabilistic_transfer),
    "fsp": lambda x: relation.flow_of_solution((x["fs4"], x["f2s"]), (x["ft4"], x["f2t"])),
    "fsp_sequence": lambda x: relation.flow_of_solution((x["hs"], x["hs2"]), (x["ht"], x["ht2"])),
    "nst_polynomial": on_images(relation.neuron_selectivity),
}
# Not a loss, but what two of them tend to or consist of; they have tests of their own.
OTHERS = {"hinton_high_temperature_limit", "dkd_parts_T_4"}


def value(loss: Loss) -> float:
    total, count = loss
    assert total.dtype == mx.float32
    assert count.item() > 0
    return total.item() / count.item()  # pyright: ignore[reportOperatorIssue, reportReturnType]


def golden_value(golden: dict[str, Any], name: str) -> Any:
    return next(loss["value"] for loss in golden["losses"] if loss["name"] == name)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(golden: dict[str, Any], name: str) -> None:
    found = value(GOLDEN[name](inputs(golden)))
    assert found == pytest.approx(golden_value(golden, name), rel=1e-5)


def test_every_golden_value_is_tested(golden: dict[str, Any]) -> None:
    assert {loss["name"] for loss in golden["losses"]} == GOLDEN.keys() | OTHERS


def test_high_temperatures_tend_to_the_square_of_the_logits(golden: dict[str, Any]) -> None:
    x = inputs(golden)
    centred = {name: x[name] - x[name].mean(axis=-1, keepdims=True) for name in ("ys", "yt")}
    found = value(on_rows(response.forward_kl, temperature=100.0)({**x, **centred}))
    expected = golden_value(golden, "hinton_high_temperature_limit")
    assert found == pytest.approx(expected, rel=2e-2)


def test_decoupled_parts(golden: dict[str, Any]) -> None:
    x, parts = inputs(golden), golden_value(golden, "dkd_parts_T_4")
    target = decoupled(alpha=1.0, beta=0.0, temperature=4.0)(x)
    others = decoupled(alpha=0.0, beta=1.0, temperature=4.0)(x)
    assert value(target) == pytest.approx(parts["tckd"], rel=1e-5)
    assert value(others) == pytest.approx(parts["nckd"], rel=1e-5)
    # Weighted by the teacher's doubt they make up the whole divergence again.
    teacher = mx.softmax(x["yt"] / 4, axis=-1)
    total = mx.array(0.0)
    for row in range(6):
        one = {**x, "rows": (mx.arange(6) == row).astype(mx.float32)}
        doubt = 1 - teacher[row, x["y"][row]]
        total += decoupled(alpha=1.0, beta=0.0, temperature=4.0)(one)[0]
        total += doubt * decoupled(alpha=0.0, beta=1.0, temperature=4.0)(one)[0]
    assert total.item() / 6 == pytest.approx(parts["kd"], rel=1e-5)


# ------------------------------------------------------------------------------------- gradients


def random(*shape: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return mx.array(values.astype(np.float32))


MASK = mx.array([[1, 1, 0.5], [1, 0, 1]])
LABELS = mx.array([[0, 3, 2], [4, -100, 1]])
TOP_IDS = mx.array([[[0, 2], [1, 3], [4, 5]], [[5, 1], [2, 0], [3, 4]]])
TOP_LOG_PROBS = mx.log(mx.array([0.6, 0.3]) * mx.ones((2, 3, 1)))
LOGITS = random(2, 3, 6, seed=1)
IMAGES = random(4, 2, 2, 3, seed=1)
DIFFERENTIABLE: dict[str, tuple[tuple[int, ...], Callable[[mx.array], Loss]]] = {
    "forward_kl": ((2, 3, 6), lambda s: response.forward_kl(s, LOGITS, MASK, 2.0)),
    "reverse_kl": ((2, 3, 6), lambda s: response.reverse_kl(s, LOGITS, MASK, 2.0)),
    "jensen_shannon": ((2, 3, 6), lambda s: response.jensen_shannon(s, LOGITS, MASK, 0.3)),
    "skew_forward_kl": ((2, 3, 6), lambda s: response.skew_forward_kl(s, LOGITS, MASK)),
    "skew_reverse_kl": ((2, 3, 6), lambda s: response.skew_reverse_kl(s, LOGITS, MASK)),
    "total_variation": ((2, 3, 6), lambda s: response.total_variation(s, LOGITS, MASK)),
    "soft_cross_entropy": ((2, 3, 6), lambda s: response.soft_cross_entropy(s, LOGITS, MASK, 2.0)),
    "logit_mse": ((2, 3, 6), lambda s: response.logit_mse(s, LOGITS, MASK, 2.0)),
    "hard_labels": ((2, 3, 6), lambda s: response.hard_labels(s, LABELS, MASK)),
    "decoupled_kd": ((2, 3, 6), lambda s: response.decoupled_kd(s, LOGITS, LABELS, MASK)),
    "sorted_l1": ((2, 3, 5), lambda s: response.sorted_l1(s, LOGITS, MASK)),
    "hidden_mse": ((2, 3, 6), lambda s: feature.hidden_mse(s, LOGITS, MASK)),
    "hidden_cosine": ((2, 3, 6), lambda s: feature.hidden_cosine(s, LOGITS, MASK)),
    "patient_kd": ((2, 3, 6), lambda s: feature.patient_kd(s, LOGITS, MASK)),
    "attention_transfer": ((4, 2, 2, 5), lambda s: feature.attention_transfer(s, IMAGES)),
    "flow_of_solution": (
        (4, 2, 2, 3),
        lambda s: relation.flow_of_solution((s, s[..., :2]), (IMAGES, IMAGES[..., 1:])),
    ),
    "similarity_preserving": ((4, 5), lambda s: relation.similarity_preserving(s, IMAGES)),
    "relational_distance": ((4, 5), lambda s: relation.relational_distance(s, IMAGES)),
    "relational_angle": ((4, 5), lambda s: relation.relational_angle(s, IMAGES)),
    "probabilistic_transfer": ((4, 5), lambda s: relation.probabilistic_transfer(s, IMAGES)),
    "neuron_selectivity": ((4, 2, 2, 5), lambda s: relation.neuron_selectivity(s, IMAGES)),
    "contrastive": ((4, 6), lambda s: relation.contrastive(s, random(4, 6, seed=3), 100)),
    **{
        f"sparse_kl {tail}": (
            (2, 3, 6),
            lambda s, tail=tail: response.sparse_kl(s, TOP_IDS, TOP_LOG_PROBS, MASK, tail),
        )
        for tail in ("bucket", "teacher", "both")
    },
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name: str) -> None:
    shape, loss = DIFFERENTIABLE[name]
    student = random(*shape, seed=7)
    found = np.array(mx.grad(lambda s: loss(s)[0])(student))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 1e-4
    random_places = np.random.default_rng(0).permutation(student.size)[:12]
    for place in random_places:
        step = np.zeros(student.size, np.float32)
        step[place] = 2e-3
        nudge = mx.array(step.reshape(shape))
        ends = [loss(student + sign * nudge)[0].item() for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 4e-3  # pyright: ignore[reportOperatorIssue]
        assert found.ravel()[place] == pytest.approx(slope, abs=5e-3, rel=2e-2)


@pytest.mark.parametrize(
    "loss",
    [
        response.forward_kl,
        response.reverse_kl,
        response.jensen_shannon,
        response.skew_forward_kl,
        response.skew_reverse_kl,
        response.total_variation,
        response.soft_cross_entropy,
        response.logit_mse,
        response.sorted_l1,
        feature.hidden_mse,
        feature.hidden_cosine,
        feature.patient_kd,
    ],
)
def test_teacher_gets_no_gradient(loss: Callable[..., Loss]) -> None:
    student = random(2, 3, 6, seed=7)
    gradient = mx.grad(lambda teacher: loss(student, teacher, MASK)[0])(LOGITS)
    assert mx.abs(gradient).max().item() == 0


# ------------------------------------------------------------------------------------ properties


DIVERGENCES = [
    response.forward_kl,
    response.reverse_kl,
    response.jensen_shannon,
    response.skew_forward_kl,
    response.skew_reverse_kl,
    response.total_variation,
    response.sorted_l1,
]


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_divergences_are_zero_between_equals_and_positive_otherwise(
    loss: Callable[..., Loss],
) -> None:
    student = random(2, 3, 6, seed=7)
    assert abs(value(loss(LOGITS, LOGITS, MASK))) < 1e-6
    assert value(loss(student, LOGITS, MASK)) > 1e-3


@pytest.mark.parametrize("loss", [*DIVERGENCES, response.soft_cross_entropy])
def test_a_constant_added_to_logits_changes_nothing(loss: Callable[..., Loss]) -> None:
    student = random(2, 3, 6, seed=7)
    shifted = value(loss(student + 40, LOGITS - 25, MASK))
    assert shifted == pytest.approx(value(loss(student, LOGITS, MASK)), rel=1e-3)


@pytest.mark.parametrize("loss", [*DIVERGENCES, response.logit_mse, feature.hidden_cosine])
def test_a_mask_equals_leaving_positions_out(loss: Callable[..., Loss]) -> None:
    student = random(2, 3, 6, seed=7)
    mask = mx.array([[1, 0, 1], [0, 0, 1]])
    spoilt = mx.where(mask[..., None] > 0, student, mx.nan)
    rows = mx.array([0, 2, 5])
    expected = loss(student.reshape(6, 6)[rows], LOGITS.reshape(6, 6)[rows], mx.ones((3,)))
    found = loss(spoilt, LOGITS, mask)
    assert value(found) == pytest.approx(value(expected), rel=1e-5)
    assert found[1].item() == 3


@pytest.mark.parametrize("loss", [response.forward_kl, response.jensen_shannon])
def test_tokens_that_the_teacher_bars(loss: Callable[..., Loss]) -> None:
    barred = mx.where(mx.arange(6) < 2, -mx.inf, LOGITS)
    student = random(2, 3, 6, seed=7)
    total, gradient = mx.value_and_grad(lambda s: loss(s, barred, MASK)[0])(student)
    assert mx.isfinite(total).item()
    assert mx.isfinite(gradient).all().item()


def test_sparse_kl_of_all_tokens_is_the_whole_divergence() -> None:
    student = random(2, 3, 6, seed=7)
    log_probs = LOGITS - mx.logsumexp(LOGITS, axis=-1, keepdims=True)
    ids = mx.broadcast_to(mx.arange(6), (2, 3, 6))
    expected = value(response.forward_kl(student, LOGITS, MASK))
    for tail in ("teacher", "both"):
        found = value(response.sparse_kl(student, ids, log_probs, MASK, tail))
        assert found == pytest.approx(expected, rel=1e-5)
    # One token less, and the bucket holds exactly that one.
    found = response.sparse_kl(student, ids[..., :5], log_probs[..., :5], MASK)
    assert value(found) == pytest.approx(expected, rel=1e-4)


def test_the_bucket_is_never_more_than_the_whole_divergence() -> None:
    student = random(2, 3, 6, seed=7)
    log_probs = LOGITS - mx.logsumexp(LOGITS, axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)
    whole = value(response.forward_kl(student, LOGITS, MASK))
    found = [
        value(
            response.sparse_kl(
                student, ids[..., :k], mx.take_along_axis(log_probs, ids[..., :k], axis=-1), MASK
            )
        )
        for k in range(1, 6)
    ]
    assert found == sorted(found)
    assert found[-1] <= whole * (1 + 1e-5)


def test_sorted_l1_takes_vocabularies_of_different_sizes() -> None:
    student = random(2, 3, 9, seed=7)
    found = value(response.sorted_l1(student, LOGITS, mx.ones((2, 3))))
    p, q = (-np.sort(-np.array(mx.softmax(x, axis=-1)), axis=-1) for x in (LOGITS, student))
    p = np.pad(p, [(0, 0), (0, 0), (0, 3)])
    assert found == pytest.approx(np.abs(p - q).sum(-1).mean(), rel=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher = (40 * random(64, 500, seed=seed) for seed in (1, 2))
    exact = value(response.forward_kl(student, teacher, mx.ones((64,))))
    half = response.forward_kl(
        student.astype(mx.float16), teacher.astype(mx.float16), mx.ones((64,))
    )
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
def test_equal_examples_have_a_finite_gradient(loss: Callable[..., Loss]) -> None:
    student = mx.concatenate([random(1, 5), random(1, 5), random(2, 5)])
    gradient = mx.grad(lambda s: loss(s, IMAGES)[0])(student)
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
        (lambda: response.jensen_shannon(LOGITS, LOGITS, MASK, 0.0), "beta must be between"),
        (lambda: response.skew_forward_kl(LOGITS, LOGITS, MASK, 1.0), "alpha must be at least 0"),
        (
            lambda: response.sparse_kl(LOGITS, TOP_IDS, TOP_LOG_PROBS, MASK, "none"),
            "tail must be bucket, teacher, both or prior, got none",
        ),
        (
            lambda: response.sparse_kl(
                LOGITS, TOP_IDS, TOP_LOG_PROBS, MASK, "bucket", temperature=2.0
            ),
            "a tail bucket needs temperature 1, got 2.0",
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
def test_what_is_refused(call: Callable[[], Loss], sentence: str) -> None:
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
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = (probs * (np.log(probs) - log_probs)).sum()
    arguments = (student, ids, top, mx.ones((2,)))
    found, _ = response.sparse_kl(*arguments, tail="prior", log_prior=log_prior)
    assert found.item() == pytest.approx(expected, rel=1e-5)
