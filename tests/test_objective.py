"""The objective's terms, each against a hand-made twin."""

import math
import re

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_distill.arrays import log_probs
from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.terms import FEATURE, LOSSES, RELATION, RESPONSE, LossTerm
from mlx_distill.errors import InputError
from mlx_distill.losses import response

N, V = 6, 11


def draw(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32))


def log_softmax(logits: mx.array) -> np.ndarray:
    values = np.array(logits).astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def total(
    text: str, logits: mx.array, goal: Goal | None, labels: mx.array, mask: mx.array
) -> float:
    value, _ = response_losses([LossTerm.parse(text)], logits, goal, labels, mask)
    return value.item()  # pyright: ignore[reportReturnType]


@pytest.fixture
def logits() -> mx.array:
    return draw(N, V)


@pytest.fixture
def theirs() -> mx.array:
    return draw(N, V, seed=1)


LABELS = mx.array([0, 5, 10, 3, 3, 7])
MASK = mx.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


# ------------------------------------------------------------------------------------------ terms


def test_every_loss_is_named_once() -> None:
    assert len(LOSSES) == len(RESPONSE) + len(FEATURE) + len(RELATION)
    for name in LOSSES:
        assert LossTerm.parse(name) == LossTerm(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hard", LossTerm("hard")),
        (
            "forward_kl:weight=0.9,temperature=2",
            LossTerm("forward_kl", 0.9, {"temperature": 2}),
        ),
        (
            " sparse_kl : tail=both , k=8 , temperature=0.5, scaled=false",
            LossTerm(
                "sparse_kl", 1.0, {"tail": "both", "k": 8, "temperature": 0.5, "scaled": False}
            ),
        ),
        ("hidden_mse:layers=0-3/1-7", LossTerm("hidden_mse", layers=((0, 3), (1, 7)))),
        ("hidden_mse:layers=-1--2", LossTerm("hidden_mse", layers=((-1, -2),))),
        ("hidden_mse:layers=0--1/-2-5", LossTerm("hidden_mse", layers=((0, -1), (-2, 5)))),
        (
            "hidden_cosine:layers=model.norm-model.layers.3",
            LossTerm("hidden_cosine", layers=(("model.norm", "model.layers.3"),)),
        ),
        ("patient_kd:weight=1e-3,layers=last", LossTerm("patient_kd", 0.001, layers="last")),
        ("contrastive:temperature=0.2", LossTerm("contrastive", options={"temperature": 0.2})),
    ],
)
def test_term_of_a_text_and_back(text: str, expected: LossTerm) -> None:
    term = LossTerm.parse(text)
    assert term == expected
    assert LossTerm.parse(str(term)) == term


@pytest.mark.parametrize("weight", [0.1234567890123, 1 / 3, 1e-12, 123456.78901, 0.0])
def test_weight_survives_being_written(weight: float) -> None:
    """Six digits would not do: a configuration is written beside the result, and used again."""
    assert LossTerm.parse(str(LossTerm("hard", weight))).weight == weight


@pytest.mark.parametrize(
    "text",
    [
        "{name: forward_kl, weight: 0.9, temperature: 2}",
        "{name: forward_kl, weight: '0.9', temperature: '2'}",
        "{temperature: 2.0, weight: 0.9, name: forward_kl}",
    ],
)
def test_term_of_a_mapping(text: str) -> None:
    expected = LossTerm.parse("forward_kl:weight=0.9,temperature=2")
    assert LossTerm.of(yaml.safe_load(text)) == expected


@pytest.mark.parametrize(
    "layers", ["[[0, 3], [1, 7]]", "0-3/1-7", "[0-3, 1-7]", "[[0, '3'], ['1', 7]]"]
)
def test_layers_of_a_mapping(layers: str) -> None:
    values = yaml.safe_load(f"{{name: hidden_mse, layers: {layers}}}")
    term = LossTerm.of(values)
    assert term.layers == ((0, 3), (1, 7))
    assert values["name"] == "hidden_mse"  # what it was given is as it was


def test_mapping_without_a_name() -> None:
    with pytest.raises(InputError, match=r"a loss needs a name, got \{'weight': 1\}"):
        LossTerm.of({"weight": 1})


def test_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="there is no loss forwad_kl; there are") as error:
        LossTerm.parse("forwad_kl")
    assert all(name in str(error.value) for name in LOSSES)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("forward_kl:temprature=2", "forward_kl has no option temprature; it has"),
        ("hard:temperature=2", "hard has no option temperature; it has weight"),
        ("hidden_mse:student=2", "hidden_mse has no option student; it has relative, weight"),
        ("forward_kl:2", "forward_kl:2: expected option=value, got 2"),
        ("forward_kl:weight=1,weight=2", "weight is given twice"),
        ("hard:weight=much", "the weight of hard must be a number, got 'much'"),
        ("hard:weight=-1", "the weight of hard must be at least 0, got -1"),
        ("hard:weight=inf", "the weight of hard must be a number, got inf"),
        ("hard:weight=nan", "the weight of hard must be a number, got nan"),
        ("hard:layers=0-1", "hard compares answers, not layers; leave layers out"),
        ("hidden_mse:layers=some", "layers must be pairs, uniform or last, got some"),
        ("hidden_mse:layers=3-", "layers must be pairs as 0-3/1-7, uniform or last, got 3-"),
        ("hidden_mse:layers=-3", "layers must be pairs as 0-3/1-7, uniform or last, got -3"),
        ("forward_kl:temperature=0", "the temperature of forward_kl must be at least 1e-6, got 0"),
        (
            "forward_kl:temperature=-1",
            "temperature of forward_kl must be at least 1e-6, got -1",
        ),
        ("logit_mse:temperature=warm", "temperature of logit_mse must be a number, got 'warm'"),
        ("logit_mse:temperature=true", "temperature of logit_mse must be a number, got True"),
        ("reverse_kl:temperature=inf", "the temperature of reverse_kl must be a number, got inf"),
        ("forward_kl:scaled=2", "the scaled of forward_kl must be true or false, got 2"),
        ("contrastive:temperature=0", "the temperature of contrastive must be at least 1e-6"),
        ("probabilistic_transfer:eps=0", "the eps of probabilistic_transfer must be above 0"),
        ("sparse_kl:k=0", "the k of sparse_kl must be at least 1, got 0"),
        ("sparse_kl:k=1.5", "the k of sparse_kl must be a whole number, got 1.5"),
        ("sparse_kl:tail=none", "tail must be bucket, teacher, both or prior, got none"),
        ("sparse_kl:temperature=2", "a tail bucket needs temperature 1, got 2"),
        ("jensen_shannon:beta=1", "jensen_shannon: beta must be between 0 and 1, got 1"),
        ("skew_reverse_kl:alpha=1", "skew_reverse_kl: alpha must be at least 0 and below 1"),
    ],
)
def test_terms_that_mean_nothing(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        LossTerm.parse(text)


def test_unknown_option_names_the_options() -> None:
    with pytest.raises(InputError) as error:
        LossTerm.parse("jensen_shannon:gamma=2")
    assert str(error.value).endswith("it has beta, scaled, temperature, weight")
    with pytest.raises(InputError) as error:
        LossTerm.parse("sparse_kl:top=2")
    assert str(error.value).endswith("it has k, scaled, tail, temperature, weight")


# ------------------------------------------------------------------------------- response losses


def test_weighted_sum_is_the_sum_by_hand(logits: mx.array, theirs: mx.array) -> None:
    terms = [LossTerm("forward_kl", 0.9), LossTerm("hard", 0.25), LossTerm("total_variation", 0.0)]
    value, sums = response_losses(terms, logits, Goal(theirs), LABELS, MASK)
    ours, goal = log_softmax(logits), log_softmax(theirs)
    mask = np.array(MASK)
    kl = ((np.exp(goal) * (goal - ours)).sum(axis=-1) * mask).sum()
    hard = -(ours[np.arange(N), np.array(LABELS)] * mask).sum()
    distance = (0.5 * np.abs(np.exp(goal) - np.exp(ours)).sum(axis=-1) * mask).sum()
    np.testing.assert_allclose([s.item() for s in sums], [kl, hard, distance], rtol=1e-5)
    assert value.item() == pytest.approx(0.9 * kl + 0.25 * hard, rel=1e-5)


def test_weights_reach_the_gradient_and_the_sums_do_not(logits: mx.array, theirs: mx.array) -> None:
    def weighted(weight: float) -> mx.array:
        term = [LossTerm("forward_kl", weight)]
        return mx.grad(lambda x: response_losses(term, x, Goal(theirs), LABELS, MASK)[0])(logits)

    def parts(x: mx.array) -> mx.array:
        return response_losses([LossTerm("hard")], x, None, LABELS, MASK)[1][0]

    np.testing.assert_allclose(weighted(3.0), 3 * weighted(1.0), rtol=1e-5)
    assert not mx.grad(parts)(logits).any().item()


def test_options_reach_the_loss(logits: mx.array, theirs: mx.array) -> None:
    found = total("forward_kl:temperature=3,scaled=false", logits, Goal(theirs), LABELS, MASK)
    ours, goal = log_softmax(logits / 3), log_softmax(theirs / 3)
    expected = ((np.exp(goal) * (goal - ours)).sum(axis=-1) * np.array(MASK)).sum()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(RESPONSE) - {"hard", "sorted_l1", "sparse_kl"}))
@pytest.mark.parametrize(("ours", "goal"), [(V, V + 3), (V + 3, V)])
def test_heads_of_other_widths_are_cut_to_the_shared_one(name: str, ours: int, goal: int) -> None:
    """What only one of them has is never a token; it must not take probability away."""
    logits, theirs = draw(N, ours), draw(N, goal, seed=1)
    cut = total(name, logits[:, :V], Goal(theirs[:, :V]), LABELS, MASK)
    assert total(name, logits, Goal(theirs), LABELS, MASK) == pytest.approx(cut, rel=1e-6)


def test_sorted_losses_see_whole_vocabularies() -> None:
    logits, theirs = draw(N, V), draw(N, V + 3, seed=1)
    found = total("sorted_l1", logits, Goal(theirs), LABELS, MASK)
    whole, cut = (
        (response.sorted_l1(log_probs(logits), log_probs(goal)) * MASK).sum().item()
        for goal in (theirs, theirs[:, :V])
    )
    assert found == pytest.approx(whole, rel=1e-6)
    assert found != pytest.approx(cut)


@pytest.mark.parametrize("name", sorted(set(RESPONSE) - {"hard"}))
def test_without_a_teacher_only_labels_can_be_learned(name: str, logits: mx.array) -> None:
    for goal in (None, Goal()):
        with pytest.raises(InputError, match=f"{name} needs a teacher"):
            total(name, logits, goal, LABELS, MASK)
        assert total("hard", logits, goal, LABELS, MASK) > 0


def top_of(logits: mx.array, k: int) -> Goal:
    log_probs = mx.array(log_softmax(logits).astype(np.float32))
    ids = mx.argsort(-log_probs, axis=-1)[:, :k]
    return Goal(None, ids, mx.take_along_axis(log_probs, ids, axis=-1), logits.shape[-1])


@pytest.mark.parametrize("name", sorted(set(RESPONSE) - {"hard", "sparse_kl"}))
def test_cached_answers_name_the_loss_that_can_use_them(
    name: str, logits: mx.array, theirs: mx.array
) -> None:
    sentence = f"{name} needs all of the teacher's logits, and a cache has the top ones; use sparse"
    with pytest.raises(InputError, match=sentence):
        total(name, logits, top_of(theirs, 4), LABELS, MASK)


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("tail", ["bucket", "teacher", "both"])
def test_sparse_kl_of_live_logits_equals_that_of_top_tokens(
    logits: mx.array, theirs: mx.array, k: int, tail: str
) -> None:
    text = f"sparse_kl:k={k},tail={tail}"
    live = total(text, logits, Goal(theirs), LABELS, MASK)
    assert total(text, logits, top_of(theirs, k), LABELS, MASK) == pytest.approx(live, rel=1e-5)


def test_sparse_kl_of_all_tokens_is_forward_kl(logits: mx.array, theirs: mx.array) -> None:
    whole = total("forward_kl", logits, Goal(theirs), LABELS, MASK)
    assert total("sparse_kl", logits, Goal(theirs), LABELS, MASK) == pytest.approx(whole, rel=1e-5)


def test_sparse_kl_uses_as_many_cached_tokens_as_it_is_told(
    logits: mx.array, theirs: mx.array
) -> None:
    live = total("sparse_kl:k=3", logits, Goal(theirs), LABELS, MASK)
    found = total("sparse_kl:k=3", logits, top_of(theirs, 8), LABELS, MASK)
    assert found == pytest.approx(live, rel=1e-5)
    with pytest.raises(InputError, match="asks for 9 tokens per position, the cache has 8"):
        total("sparse_kl:k=9", logits, top_of(theirs, 8), LABELS, MASK)


def test_sparse_kl_of_a_narrower_cached_teacher() -> None:
    """What the student's head has beyond the teacher's vocabulary is never a token."""
    logits, theirs = draw(N, V + 5), draw(N, V, seed=1)
    for tail in ("bucket", "teacher"):
        found = total(f"sparse_kl:tail={tail}", logits, top_of(theirs, 4), LABELS, MASK)
        cut = total(f"sparse_kl:tail={tail}", logits[:, :V], top_of(theirs, 4), LABELS, MASK)
        assert found == pytest.approx(cut, rel=1e-6)


@pytest.mark.parametrize("name", sorted(RESPONSE))
def test_labels_that_are_none_count_nothing(name: str, logits: mx.array, theirs: mx.array) -> None:
    spoilt = mx.where(MASK > 0, LABELS, -100)
    found = total(name, logits, Goal(theirs), spoilt, MASK)
    assert found == total(name, logits, Goal(theirs), LABELS, MASK)


def test_sparse_kl_of_a_wider_teacher(logits: mx.array) -> None:
    """An id that the student's head does not have must not be read from beyond it."""
    theirs = draw(N, V + 5, seed=1)
    theirs[:, V + 2] += 6.0  # the most probable one is none of the student's
    live = total("sparse_kl:k=4", logits, Goal(theirs), LABELS, MASK)
    cut = total("sparse_kl:k=4", logits, Goal(theirs[:, :V]), LABELS, MASK)
    assert live == pytest.approx(cut, rel=1e-6)

    def cached(x: mx.array) -> mx.array:
        goal = top_of(theirs, 4)
        return response_losses([LossTerm("sparse_kl")], x, goal, LABELS, MASK)[0]

    # By hand: the cached tokens that the student has, and all the rest in one bucket.
    goal = np.exp(log_softmax(theirs))
    ours = np.exp(log_softmax(logits))
    expected = 0.0
    for row in np.flatnonzero(np.array(MASK)):
        some = [i for i in np.argsort(-goal[row])[:4] if i < V]
        p, q = goal[row, some], ours[row, some]
        expected += (p * np.log(p / q)).sum()
        expected += (1 - p.sum()) * math.log((1 - p.sum()) / (1 - q.sum()))
    value, gradient = mx.value_and_grad(cached)(logits)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert mx.isfinite(gradient).all().item()
    for row, column in ((0, 2), (2, 9)):
        step = mx.zeros((N, V))
        step[row, column] = 1e-2
        slope = (cached(logits + step) - cached(logits - step)).item() / 2e-2
        assert gradient[row, column].item() == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("name", ["sorted_l1", "forward_kl", "sparse_kl", "decoupled_kd"])
def test_where_the_teacher_says_nothing_nothing_is_learned(
    name: str, logits: mx.array, theirs: mx.array
) -> None:
    known = mx.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    found = total(name, logits, Goal(theirs, known=known), LABELS, MASK)
    assert found == pytest.approx(total(name, logits, Goal(theirs), LABELS, MASK * known))
    assert found != pytest.approx(total(name, logits, Goal(theirs), LABELS, MASK))
    hard = total("hard", logits, Goal(theirs, known=known), LABELS, MASK)
    assert hard == total("hard", logits, None, LABELS, MASK)  # the text still says something


# -------------------------------------------------------------------------------------- features
