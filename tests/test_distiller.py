"""Distillation: the loss of a batch against slow twins, its gradients, and what is judged."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distillers import (
    MIXED,
    TEXTS,
    V,
    assert_close,
    bits,
    make,
    make_texts,
    run,
    small,
    terms,
    value_and_grads,
)
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tiny_models import tiny_model

from mlx_distill import Examples, InputError
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation import comparison
from mlx_distill.distillation import distiller as module
from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.teachers import (
    Lesson,
    LiveTeacher,
)
from mlx_distill.distillation.terms import FEATURE, RELATION, RESPONSE
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.loop import train

# ------------------------------------------------------------------------------ the loss of a batch


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_chunked_loss_equals_the_naive_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen positions at a time, six times; gemma2 caps its logits."""
    monkeypatch.setattr(module, "chunk_rows", lambda width: 16)
    batch = text_batch(TEXTS, [0, 3, 7])
    assert batch.mask.size == 96
    student, teacher = small(name), tiny_model("llama")
    losses = [*MIXED, "total_variation:weight=0.1", "sparse_kl:weight=0.5,k=9"]
    made = make(losses, batch, student, LiveTeacher([teacher]))
    assert made.answers.body is not None
    goal = Goal(teacher(batch.inputs).reshape(-1, V))

    def naive(model: Any) -> mx.array:
        logits = model(batch.inputs).reshape(-1, V)
        given = batch.labels.reshape(-1), batch.mask.reshape(-1)
        return response_losses(terms(losses), logits, goal, *given)[0]

    expected, grads = value_and_grad(student, naive)(student)
    total, count, found = value_and_grads(made, batch)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert count == batch.mask.sum().item()
    wanted = {f"student.{k}": x for k, x in tree_flatten(grads)}  # pyright: ignore
    assert_close(found, wanted, 1e-4)


def test_parts_are_means_and_make_the_whole() -> None:
    batch = text_batch(TEXTS, [1, 2])
    losses = ["forward_kl:weight=0.5", "hard:weight=2", "hidden_mse:weight=3,layers=0-0"]
    made = make([*losses, "hidden_mse:weight=4,layers=1-2", "relational_distance"], batch)
    total, count, parts = made.loss(made.teach(batch))
    names = ["forward_kl", "hard", "hidden_mse", "hidden_mse_2", "relational_distance"]
    assert list(parts) == names
    whole = sum(w * parts[n].item() for w, n in zip((0.5, 2, 3, 4, 1), names, strict=True))
    assert total.item() / count.item() == pytest.approx(whole, rel=1e-5)
    assert parts["hidden_mse"].item() != parts["hidden_mse_2"].item()


def test_parts_against_numpy() -> None:
    batch = text_batch(TEXTS, [4, 5])
    teacher, student = tiny_model("llama"), small()
    made = make(["forward_kl", "hard"], batch, student, LiveTeacher([teacher]))
    _, _, parts = made.loss(made.teach(batch))
    ours, theirs = (
        np.array(nn.log_softmax(model(batch.inputs))).astype(np.float64)
        for model in (student, teacher)
    )
    mask, labels = np.array(batch.mask), np.array(batch.labels)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    hard = -np.take_along_axis(ours, labels[..., None], axis=-1)[..., 0]
    assert parts["forward_kl"].item() == pytest.approx((kl * mask).sum() / mask.sum(), rel=1e-4)
    assert parts["hard"].item() == pytest.approx((hard * mask).sum() / mask.sum(), rel=1e-4)
    found = made.evaluate([batch])
    assert found["kl"] == pytest.approx((kl * mask).sum() / mask.sum(), rel=1e-4)
    assert found["nats"] == pytest.approx((hard * mask).sum() / mask.sum(), rel=1e-4)
    agree = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)) * mask
    assert found["agreement"] == pytest.approx(agree.sum() / mask.sum())
    assert set(found) == {"nats", "kl", "agreement", "perplexity"}


ALL = [
    *(f"{name}:layers=0-1/1-2" for name in [*FEATURE, *RELATION]),
    *(name for name in RESPONSE if name != "decoupled_kd"),
    "decoupled_kd:beta=2",
]


@pytest.mark.parametrize("loss", ALL)
def test_padding_is_inert(loss: str) -> None:
    rows = [0, 2, 5]
    narrow, wide = text_batch(TEXTS, rows), text_batch(TEXTS, rows, multiple=80)
    assert wide.inputs.shape[1] > 2 * narrow.inputs.shape[1]
    made = make([loss], narrow)
    total, count, grads = value_and_grads(made, narrow)
    again, same, others = value_and_grads(made, wide)
    assert same == count
    assert math.isfinite(total)
    assert again == pytest.approx(total, rel=1e-4)
    assert_close(others, grads, 2e-3)
    moved = [name for name, x in grads.items() if mx.abs(x).max().item() > 0]  # pyright: ignore
    assert any(name.startswith("student.") for name in moved)


def test_relations_of_texts_are_of_learned_tokens() -> None:
    """Neither prompts nor padding are compared, and no more than a few tokens."""
    batch = text_batch(TEXTS, [0, 2, 5])
    learned = np.flatnonzero(np.array(batch.mask.reshape(-1)))
    assert comparison.some_places(batch.mask).tolist() == learned.tolist()
    many = comparison.some_places(mx.ones((40, 50)))
    assert len(many.tolist()) <= comparison.RELATION_TOKENS
    assert len(many.tolist()) > comparison.RELATION_TOKENS // 2


def test_flow_of_texts_is_the_mean_over_their_learned_tokens() -> None:
    """Equation 1 with as many places as a text has learned tokens."""
    batch = text_batch(TEXTS, [0, 3])
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama")
    losses = ["flow_of_solution:layers=0-0/1-2"]
    made = make(losses, batch, student, LiveTeacher([teacher]))
    assert not made.network.projections
    _, _, parts = made.loss(made.teach(batch))
    flows = []
    for model, layers in ((student, (0, 1)), (teacher, (0, 2))):
        _, features = module.Answers(model, True).read(batch.inputs, layers)
        first, second = (np.array(features[layer]).astype(np.float64) for layer in layers)
        flows.append(
            [
                a[m > 0].T @ b[m > 0] / (m > 0).sum()
                for a, b, m in zip(first, second, np.array(batch.mask), strict=True)
            ]
        )
    ours, theirs = np.array(flows)
    apart = np.square(ours - theirs).mean(axis=(1, 2)) / np.square(theirs).mean(axis=(1, 2))
    expected = apart.mean()
    assert parts["flow_of_solution"].item() == pytest.approx(expected, rel=1e-3)


def test_feature_losses_compare_learned_tokens_behind_the_projection() -> None:
    batch = text_batch(TEXTS, [0, 3])
    student, teacher = small(), tiny_model("llama")
    losses = ["hidden_mse:layers=1-2,relative=false"]
    made = make(losses, batch, student, LiveTeacher([teacher]))
    _, _, parts = made.loss(made.teach(batch))
    _, ours = module.Answers(student, True).read(batch.inputs, [1])
    _, theirs = module.Answers(teacher, True).read(batch.inputs, [2])
    weight = np.array(made.network.projections["pair_0_0"].weight).astype(np.float64)
    squares = np.square(np.array(ours[1]) @ weight.T - np.array(theirs[2])).mean(axis=-1)
    mask = np.array(batch.mask)
    expected = (squares * mask).sum() / mask.sum()
    assert parts["hidden_mse"].item() == pytest.approx(expected, rel=1e-4)


def test_projections_stand_where_widths_differ() -> None:
    batch = text_batch(TEXTS, [0, 3])
    losses = ["hidden_mse", "attention_transfer", "similarity_preserving", "patient_kd:layers=last"]
    made = make(losses, batch)
    shapes = {name: p.weight.shape for name, p in made.network.projections.items()}
    assert shapes == dict.fromkeys(("pair_0_0", "pair_0_1", "pair_3_0"), (64, 32))
    assert not make(losses, batch, tiny_model("llama", seed=1)).network.projections
    same = make(losses, batch).network.projections["pair_0_0"].weight
    assert mx.array_equal(same, made.network.projections["pair_0_0"].weight).item()


def first_moments(folder: Path) -> dict[str, mx.array]:
    """Return a tenth of the gradients of a training of one step."""
    state = mx.load(str(checkpoints(folder)[-1] / "optimizer.safetensors"))
    assert isinstance(state, dict)
    return {name: x for name, x in state.items() if name.endswith(".m")}


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path: Path) -> None:
    """The batches have 61 and 7 labels: a mean of means would weigh them alike."""
    losses = [*MIXED, "hidden_mse:weight=0.5,layers=1-2", "patient_kd:layers=0-1"]
    texts = make_texts(6)
    short = Text.behind(texts[0].tokens[:9], 2)
    parts = [text_batch(texts, [0, 1, 2]), text_batch([short], [0])]
    whole = text_batch([*texts[:3], short], [0, 1, 2, 3])
    assert parts[0].mask.sum().item() > 3 * parts[1].mask.sum().item()  # pyright: ignore
    found = []
    for batches in (parts, [whole]):
        made = make(losses, whole)
        config = TrainingConfig(steps=1, accumulate=len(batches), max_grad_norm=1e9)
        folder = tmp_path / str(len(batches))
        taught = [made.teach(batch) for batch in batches]
        steps = train(made.network, made.loss, taught.__getitem__, dict, config, folder)
        found.append((list(steps), first_moments(folder)))
    assert_close(found[0][1], found[1][1], 1e-4)
    (first,), (second,) = found[0][0], found[1][0]
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.count == second.count == whole.mask.sum().item()
    for name, value in second.parts.items():
        assert first.parts[name] == pytest.approx(value, rel=1e-5)


def test_contrastive_batch_of_one_learned_token() -> None:
    """The rest of the epoch has more; this one has nothing to be told from."""
    batch = text_batch([*TEXTS, Text.behind([1, 2, 3], 2)], [12])
    total, count, grads = value_and_grads(make(["contrastive:layers=last"], batch), batch)
    assert (total, count) == (0, 1)
    assert all(mx.all(gradient == 0).item() for gradient in grads.values())


class Barring:
    """A teacher that bars a token at the first place of the first text, which is not learned."""

    def lesson(self, batch: Any, layers: Any = ()) -> Lesson:
        logits = tiny_model("llama")(batch.inputs)
        return Lesson((logits.at[0, 0, 5].add(-mx.inf),), Goal)


@pytest.mark.parametrize("loss", [name for name in RESPONSE if name != "hard"])
def test_what_is_not_learned_has_no_gradient_whatever_it_is(loss: str) -> None:
    """KL(student || teacher) is infinite where the teacher bars a token."""
    batch = text_batch(TEXTS, [0, 3])
    assert batch.mask[0, 0].item() == 0
    total, _, grads = value_and_grads(make([loss], batch, teacher=Barring()), batch)
    expected, _, others = value_and_grads(make([loss], batch), batch)
    assert total == pytest.approx(expected, rel=1e-5)
    assert_close(grads, others, 1e-4)


@pytest.mark.parametrize("loss", [*FEATURE, *RELATION])
def test_texts_with_nothing_to_learn_are_not_compared(loss: str) -> None:
    """They change nothing beside others; alone they have a loss of zero and no gradient."""
    batch = text_batch([*TEXTS, Text(TEXTS[1].tokens, [False] * len(TEXTS[1].tokens))], [0, 2, 12])
    made = make([f"{loss}:layers=0-1/1-2"], batch)
    found = made.loss(made.teach(batch))[2][loss].item()
    others = text_batch(TEXTS, [0, 2])
    assert found == pytest.approx(made.loss(made.teach(others))[2][loss].item(), rel=1e-4)
    nothing = replace(batch, mask=mx.zeros_like(batch.mask))
    total, count, grads = value_and_grads(made, nothing)
    assert (total, count) == (0, 0)
    assert all(mx.all(gradient == 0).item() for gradient in grads.values())


def test_numpy_arrays_are_examples_too() -> None:
    images, labels = np.ones((3, 4), np.float32), np.array([0, 1, 2])
    found = Examples.of(images, labels).take([2, 0])
    assert found.labels.tolist() == [2, 0]
    assert mx.array_equal(found.inputs, mx.ones((2, 4))).item()


@pytest.mark.parametrize("widths", [(3, 4), (4, 3)])
def test_teachers_of_other_numbers_of_classes(widths: tuple[int, int], tmp_path: Path) -> None:
    data = Examples.of(mx.random.normal((8, 4)), mx.array([0, 1, 2, 0, 1, 2, 0, 1]))
    teachers = [nn.Linear(4, width) for width in widths]
    with pytest.raises(InputError, match=f"the teachers have {widths[0]} and {widths[1]} classes"):
        run(tmp_path, nn.Linear(4, 3), teachers, data)


def test_objective_without_weight() -> None:
    with pytest.raises(InputError, match="all losses have a weight of 0"):
        make(["forward_kl:weight=0", "hard:weight=0"], text_batch(TEXTS, [0]))


MIXTURES = {
    "response": MIXED,
    "feature": ["hidden_mse:weight=2,layers=0-1/1-2", "hidden_cosine:layers=1-2"],
    "relation": ["similarity_preserving:weight=50,layers=1-2", "contrastive:layers=last"],
    "all": [
        *("forward_kl:weight=0.7", "hard:weight=0.2", "hidden_mse:layers=1-2"),
        *("similarity_preserving:weight=30,layers=0-1", "flow_of_solution"),
    ],
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_gradients_against_finite_differences(
    mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along random directions in each of the parameters, of several chunks."""
    monkeypatch.setattr(module, "chunk_rows", lambda width: 16)
    batch = text_batch(TEXTS, [0, 6])
    student = small()
    student.update(tree_map(lambda x: 3 * x if x.ndim > 1 else x, student.parameters()))
    made = make(MIXTURES[mixture], batch, student)
    total, _, grads = value_and_grads(made, batch)
    taught = made.teach(batch)
    start = dict(tree_flatten(made.network.trainable_parameters()))
    assert set(grads) == set(start)
    random = np.random.default_rng(4)

    def at(name: str, step: mx.array) -> float:
        made.network.update(tree_unflatten([(name, start[name] + step)]))
        value = made.loss(taught)[0].item()
        made.network.update(tree_unflatten([(name, start[name])]))
        return value  # pyright: ignore

    checked = 0
    for name, gradient in grads.items():
        norm = mx.linalg.norm(gradient).item()
        if norm < 1e-3 * abs(total):  # pyright: ignore
            continue
        # Half along the gradient: in a random direction alone the slope would drown in rounding.
        noise = mx.array(random.normal(size=gradient.shape).astype(np.float32))
        direction = gradient / norm + noise / mx.linalg.norm(noise)
        step = 2e-2 * direction
        slope = (at(name, step) - at(name, -step)) / 4e-2
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=0.03), name
        checked += 1
    assert checked >= 8
    if mixture in ("feature", "all"):
        assert any(name.startswith("projections.") for name in grads)


def test_teacher_receives_no_gradient_and_stays_as_it_is(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    before = bits(teacher)
    losses = [*MIXED, "hidden_mse", "sparse_kl", "similarity_preserving", "flow_of_solution"]
    student = small()
    start = bits(student)
    run(tmp_path, student, teacher, losses=losses)
    assert bits(teacher) == before
    assert not tree_flatten(teacher.trainable_parameters())
    assert not teacher.training
    moved = {name for name, x in bits(student).items() if x != start[name]}
    assert moved == set(start)
    batch = text_batch(TEXTS, [0, 3])
    made = make(losses, batch, small(), LiveTeacher([teacher]))
    teacher.unfreeze()  # as a user might
    _, grads = value_and_grad(teacher, lambda _: made.loss(made.teach(batch))[0])(teacher)
    assert not any(x.any().item() for _, x in tree_flatten(grads))  # pyright: ignore


def test_projections_are_trained_and_kept_in_the_checkpoint(tmp_path: Path) -> None:
    student = small()
    names = set(bits(student))
    run(tmp_path, student, tiny_model("llama"), losses=["forward_kl", "hidden_mse:layers=1-2"])
    saved = mx.load(str(checkpoints(tmp_path)[-1] / "network.safetensors"))
    assert isinstance(saved, dict)
    assert set(saved) == {f"student.{name}" for name in names} | {"projections.pair_0_0.weight"}
    first = make(["forward_kl", "hidden_mse:layers=1-2"], text_batch(TEXTS, [0, 1]))
    start = first.network.projections["pair_0_0"].weight
    assert saved["projections.pair_0_0.weight"].shape == start.shape
    assert not mx.allclose(saved["projections.pair_0_0.weight"], start, atol=1e-3).item()
    assert set(bits(student)) == names  # what is exported


def test_own_distribution_is_learned_already(tmp_path: Path) -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    done = run(
        tmp_path,
        student,
        teacher,
        losses=["forward_kl", "reverse_kl", "jensen_shannon", "hidden_mse"],
        valid=TEXTS[:4],
        training={"steps": 1},
    )
    assert abs(done.log[0]["loss"]) < 1e-5
    batch = text_batch(TEXTS, [0, 1, 2])
    found = make(["forward_kl"], batch, tiny_model("llama"), LiveTeacher([teacher])).evaluate(
        [batch]
    )
    assert abs(found["kl"]) < 1e-6
    assert found["agreement"] == 1


def test_student_cannot_be_its_own_teacher(tmp_path: Path) -> None:
    """A teacher is frozen, so nothing would be trained, without a word."""
    model = tiny_model("llama")
    with pytest.raises(InputError, match="the student is its own teacher; load the network twice"):
        run(tmp_path, model, model)


def test_tiny_task_is_overfitted(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        small(),
        tiny_model("llama"),
        TEXTS[:3],
        valid=TEXTS[:3],
        training={"steps": 60, "evaluate_every": 30, "checkpoint_every": 60, "warmup": 0.05},
    )
    kl = [done.before["kl"], done.log[-1]["held_out"]["kl"]]
    assert kl[-1] < 0.1 * kl[0]
    assert done.log[-1]["held_out"]["agreement"] > 0.8
    assert [row["step"] for row in done.log] == list(range(1, 61))
    assert done.finished
