"""Distillation losses against published values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.arrays import log_probs
from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.losses import feature, relation, response


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


# A loss's values, and the weights of their mean.
Values = tuple[mx.array, mx.array | None]


Case = Callable[[dict[str, mx.array]], Values]


def top3(x: dict[str, mx.array], tail: str) -> Values:
    known = log_probs(x["teacher_logits"])
    ids = mx.argsort(-known, axis=-1)[..., :3]
    top = mx.take_along_axis(known, ids, axis=-1)
    return response.sparse_kl(log_probs(x["student_logits"]), ids, top, tail), x["labelled"]


def objective(ours: str, theirs: str, mask: str, name: str, **options: Any) -> Case:
    """Return the objective's mean: temperatures and masks are its business."""

    def case(x: dict[str, mx.array]) -> Values:
        logits, goal = (x[key].reshape(-1, x[key].shape[-1]) for key in (ours, theirs))
        labels = x["y"] if mask == "rows" else x["labels"].reshape(-1)
        weights = x[mask].reshape(-1)
        total, _ = response_losses(
            [LossTerm(name, options=options)], logits, Goal(goal), labels, weights
        )
        return total / weights.sum(), None

    return case


def on_tokens(name: str, **options: Any) -> Case:
    return objective("student_logits", "teacher_logits", "labelled", name, **options)


def on_rows(name: str, **options: Any) -> Case:
    return objective("ys", "yt", "rows", name, **options)


def on_images(loss: Callable[..., mx.array], **options: Any) -> Case:
    return lambda x: (loss(x["fs4"], x["ft4"], **options), None)


GOLDEN: dict[str, Case] = {
    "forward_kl": on_tokens("forward_kl"),
    "reverse_kl": on_tokens("reverse_kl"),
    "jensen_shannon_beta_0.1": on_tokens("jensen_shannon", beta=0.1),
    "jensen_shannon_beta_0.5": on_tokens("jensen_shannon", beta=0.5),
    "jensen_shannon_beta_0.9": on_tokens("jensen_shannon", beta=0.9),
    "jensen_shannon_beta_0.5_T_2_unscaled": on_tokens(
        "jensen_shannon", temperature=2.0, scaled=False
    ),
    "total_variation": on_tokens("total_variation"),
    "skew_forward_kl_alpha_0.1": on_tokens("skew_forward_kl", alpha=0.1),
    "skew_reverse_kl_alpha_0.1": on_tokens("skew_reverse_kl", alpha=0.1),
    "kl_T_2_scaled": on_tokens("forward_kl", temperature=2.0),
    "hinton_kd_T_4": on_rows("forward_kl", temperature=4.0),
    "soft_cross_entropy_T_2_unscaled": on_rows("soft_cross_entropy", temperature=2.0, scaled=False),
    "logit_mse_T_2": on_rows("logit_mse", temperature=2.0),
    "dkd_alpha_1_beta_8_T_4": on_rows("decoupled_kd", temperature=4.0),
    "top3_forward_kl_teacher_renormalised": lambda x: top3(x, "teacher"),
    "top3_forward_kl_tail_bucket": lambda x: top3(x, "bucket"),
    "top3_forward_kl_both_renormalised": lambda x: top3(x, "both"),
    "uld_sorted_l1": on_tokens("sorted_l1"),
    "hint_mse": on_images(feature.hidden_mse, relative=False),
    "attention_transfer_p_2": on_images(feature.attention_transfer),
    "hidden_mse_masked": lambda x: (
        feature.hidden_mse(x["hs"], x["ht"], relative=False),
        x["mask"],
    ),
    "hidden_cosine_masked": lambda x: (feature.hidden_cosine(x["hs"], x["ht"]), x["mask"]),
    "pkd_first_token": lambda x: (feature.patient_kd(x["hs"][:, 0], x["ht"][:, 0]), None),
    # The relations between examples see the features in the order of the golden inputs.
    "similarity_preserving": on_images(relation.similarity_preserving),
    "rkd_distance": on_images(relation.relational_distance),
    "rkd_angle": on_images(relation.relational_angle),
    "pkt": on_images(relation.probabilistic_transfer),
    "fsp": lambda x: (
        relation.flow_of_solution((x["fs4"], x["f2s"]), (x["ft4"], x["f2t"]), relative=False),
        None,
    ),
    "fsp_sequence": lambda x: (
        relation.flow_of_solution((x["hs"], x["hs2"]), (x["ht"], x["ht2"]), relative=False),
        None,
    ),
    "nst_polynomial": on_images(relation.neuron_selectivity),
}


# Not a loss, but what two of them tend to or consist of; they have tests of their own.
OTHERS = {"hinton_high_temperature_limit", "dkd_parts_T_4"}


def value(values: mx.array, weights: mx.array | None = None) -> float:
    """Return the weighted mean of a loss's values."""
    assert values.dtype == mx.float32
    weights = mx.ones(values.shape) if weights is None else weights
    return ((values * weights).sum() / weights.sum()).item()  # pyright: ignore


def golden_value(golden: dict[str, Any], name: str) -> Any:
    return next(loss["value"] for loss in golden["losses"] if loss["name"] == name)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(golden: dict[str, Any], name: str) -> None:
    found = value(*GOLDEN[name](inputs(golden)))
    assert found == pytest.approx(golden_value(golden, name), rel=1e-5)


def test_every_golden_value_is_tested(golden: dict[str, Any]) -> None:
    assert {loss["name"] for loss in golden["losses"]} == GOLDEN.keys() | OTHERS


def test_high_temperatures_tend_to_the_square_of_the_logits(golden: dict[str, Any]) -> None:
    x = inputs(golden)
    centred = {name: x[name] - x[name].mean(axis=-1, keepdims=True) for name in ("ys", "yt")}
    found = value(*on_rows("forward_kl", temperature=100.0)({**x, **centred}))
    expected = golden_value(golden, "hinton_high_temperature_limit")
    assert found == pytest.approx(expected, rel=2e-2)


def test_decoupled_parts(golden: dict[str, Any]) -> None:
    x, parts = inputs(golden), golden_value(golden, "dkd_parts_T_4")
    student, teacher = log_probs(x["ys"] / 4), log_probs(x["yt"] / 4)
    target, others = (
        16 * response.decoupled_kd(student, teacher, x["y"], alpha, 1 - alpha)
        for alpha in (1.0, 0.0)
    )
    assert value(target) == pytest.approx(parts["tckd"], rel=1e-5)
    assert value(others) == pytest.approx(parts["nckd"], rel=1e-5)
    # Weighted by the teacher's doubt they make up the whole divergence again.
    doubt = 1 - mx.exp(mx.take_along_axis(teacher, x["y"][:, None], axis=-1))[:, 0]
    assert value(target + doubt * others) == pytest.approx(parts["kd"], rel=1e-5)
