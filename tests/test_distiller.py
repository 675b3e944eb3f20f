"""Distillation: the loss of a batch against slow twins, its gradients, and whole trainings."""

import json
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_models import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill import Examples, InputError
from mlx_distill.arrays import log_probs
from mlx_distill.checkpoint import bundled
from mlx_distill.data.teacher_cache import TeacherCache, write_cache
from mlx_distill.data.texts import Text, TextBatch, text_batch
from mlx_distill.distillation import comparison
from mlx_distill.distillation import distiller as module
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.comparison import same_places
from mlx_distill.distillation.distiller import Distiller
from mlx_distill.distillation.objective import Goal, response_losses
from mlx_distill.distillation.on_policy import OnPolicyConfig, Rollouts
from mlx_distill.distillation.students import from_config
from mlx_distill.distillation.teachers import (
    CachedTeacher,
    LiveTeacher,
    RetokenizedTeacher,
    TextTeacher,
    mean_logits,
)
from mlx_distill.distillation.terms import FEATURE, RELATION, RESPONSE, LossTerm
from mlx_distill.distillation.training import Distilled, distill
from mlx_distill.losses import response
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.journal import LOG
from mlx_distill.training.loop import train

V = 97
HALF = OnPolicyConfig(on_policy=0.5)
MIXED = ["forward_kl:weight=0.7,temperature=2", "hard:weight=0.3", "reverse_kl:weight=0.2"]


def make_texts(count: int, seed: int = 0, longest: int = 30, vocab_size: int = V) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = [longest, *random.integers(5, longest + 1, count - 1).tolist()]
    return [Text.behind(random.integers(1, vocab_size, n).tolist(), 1 + n // 4) for n in lengths]


TEXTS = make_texts(12)


def small(name: str = "llama", seed: int = 3, **fields: Any) -> Any:
    """Return a student of half the teacher's width."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
    return from_config(tiny_config(name) | sizes | fields, seed)


def terms(texts: Sequence[str]) -> list[LossTerm]:
    return [LossTerm.parse(text) for text in texts]


def make(losses: Sequence[str], batch: Any, student: Any = None, teacher: Any = None) -> Distiller:
    student, teacher = student or small(), teacher or LiveTeacher([tiny_model("llama")])
    made = Distiller(student, teacher, terms(losses), batch, num_examples=12)
    student.train()
    return made


def value_and_grads(made: Distiller, batch: Any) -> tuple[float, float, dict[str, mx.array]]:
    """Return a batch's sum, count and gradients."""
    taught = made.teach(batch)
    (total, count, _), grads = value_and_grad(made.network, made.loss)(taught)
    mx.eval(total, count, grads)
    return total.item(), count.item(), dict(tree_flatten(grads))  # pyright: ignore


def assert_close(found: dict[str, mx.array], expected: dict[str, mx.array], tol: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = max(1e-3, mx.abs(gradient).max().item())  # pyright: ignore
        np.testing.assert_allclose(found[name], gradient, atol=tol * scale, err_msg=name)


def bits(network: nn.Module) -> dict[str, bytes]:
    arrays: dict[str, Any] = dict(tree_flatten(network.parameters()))
    return {name: bytes(memoryview(x)) for name, x in arrays.items()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if path.name == LOG:
        measured = [set(row.pop("measured")) for row in rows]
        assert all(one == {"tokens_per_second", "peak_memory_gb"} for one in measured)
    return rows


def run(folder: Path, student: Any, teacher: Any, texts: Any = None, **options: Any) -> Distilled:
    steps = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "learning_rate": 1e-2}
    training = TrainingConfig(**{**steps, **options.pop("training", {})})
    texts = TEXTS if texts is None else texts
    options = {"batch_size": 3, "quiet": True, "seed": 5, **options}
    return distill(student, teacher, texts, folder=folder, training=training, **options)


# ----------------------------------------------------------------------------------- a run's folder


def test_finished_run_returns_its_result(tmp_path: Path) -> None:
    first, again = small(), small()
    expected = run(tmp_path, first, tiny_model("llama"), valid=TEXTS[:2])
    found = run(tmp_path, again, tiny_model("llama"), valid=TEXTS[:2])
    assert found == expected
    assert found.before["kl"] != found.log[-1]["held_out"]["kl"]
    assert bits(again) == bits(first)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"losses": "reverse_kl"}, "losses was"),
        ({"seed": 6}, "seed was 5, is 6"),
        ({"batch_size": 2}, "batch_size was 3, is 2"),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate was 0.01, is 0.001"),
        ({"texts": TEXTS[1:]}, "data was"),
        ({"on_policy": HALF}, "on_policy was None, is"),
        ({"teacher": tiny_model("llama-tied")}, "teachers.networks was"),
        ({"student": small(hidden_size=64)}, r"student.lm_head.weight was \[97, 32\], is"),
    ],
)
def test_run_with_other_arguments_does_not_go_on(
    tmp_path: Path, options: dict[str, Any], changed: str
) -> None:
    run(tmp_path, small(), tiny_model("llama"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"student": small(), "teacher": tiny_model("llama"), **options}
    with pytest.raises(InputError, match=rf"cannot resume with other settings: .*{changed}"):
        run(tmp_path, **given)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_other_examples_are_other_data(tmp_path: Path) -> None:
    inputs, labels = mx.random.normal((8, 4)), mx.array([0, 1, 2, 0, 1, 2, 0, 1])
    for name, change in (("inputs", inputs + 1), ("labels", labels[::-1])):
        folder = tmp_path / name
        run(folder, nn.Linear(4, 3), nn.Linear(4, 3), Examples.of(inputs, labels))
        other = {"inputs": inputs, "labels": labels} | {name: change}
        with pytest.raises(InputError, match="other settings: data was"):
            run(folder, nn.Linear(4, 3), nn.Linear(4, 3), Examples.of(**other))


def test_checkpoints_without_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, small(), tiny_model("llama"))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"holds checkpoints and no settings\.json"):
        run(tmp_path, small(), tiny_model("llama"))


def test_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = small(), small()
    run(tmp_path, expected, tiny_model("llama"))
    newest = tmp_path / "step-0000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    run(tmp_path, found, tiny_model("llama"))
    said = "step-0000006 is damaged; going on from step-0000004"
    assert said in capsys.readouterr().err
    assert bits(found) == bits(expected)


def test_student_that_comes_to_nothing_on_held_out_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is measured before a step: the last step's damage shows in held-out texts only."""
    found = [{"nats": 3.0}, {"nats": 2.0}, {"nats": math.nan}]
    monkeypatch.setattr(Distiller, "evaluate", lambda *_: found.pop(0))
    message = r"held-out nats of step 6 is nan.* the last good checkpoint is .*step-0000004"
    with pytest.raises(InputError, match=message):
        run(tmp_path, small(), tiny_model("llama"), valid=TEXTS[:2])


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
        training={"steps": 150, "evaluate_every": 1, "checkpoint_every": 150, "warmup": 0.05},
    )
    kl = [row["held_out"]["kl"] for row in done.log]
    assert kl[-1] < 0.1 * kl[0]
    assert done.log[-1]["held_out"]["agreement"] > 0.8
    assert [row["step"] for row in done.log] == list(range(1, 151))
    assert done.finished


# ------------------------------------------------------------------------------------ what is held


def test_classes_must_be_the_teachers(tmp_path: Path) -> None:
    data = Examples.of(mx.random.normal((8, 4)), mx.array([0, 1, 2, 0, 1, 2, 0, 1]))
    with pytest.raises(InputError, match="the teacher has 5 classes, the student 3"):
        run(tmp_path, nn.Linear(4, 3), nn.Linear(4, 5), data)
    with pytest.raises(InputError, match="a label is 2, the student has 2 classes"):
        run(tmp_path, nn.Linear(4, 2), nn.Linear(4, 2), data)
    minus = Examples.of(data.inputs, data.labels - 1)
    with pytest.raises(InputError, match="a label is -1, the student has 3 classes"):
        run(tmp_path, nn.Linear(4, 3), nn.Linear(4, 3), data, valid=minus)
    weights = (data.labels > 0).astype(mx.float32)
    masked = Examples(data.inputs, mx.where(weights > 0, data.labels, -100), weights, data.rows)
    run(tmp_path / "masked", nn.Linear(4, 3), nn.Linear(4, 3), masked)
    done = run(tmp_path, nn.Linear(4, 3), nn.Linear(4, 3), data, valid=data)
    assert set(done.log[-1]["held_out"]) == {"nats", "accuracy", "kl", "agreement"}
    with pytest.raises(InputError, match="only language models can write what they learn from"):
        run(tmp_path / "own", nn.Linear(4, 3), nn.Linear(4, 3), data, on_policy=HALF)


def test_examples_must_have_labels() -> None:
    with pytest.raises(InputError, match="8 inputs do not fit 3 labels"):
        Examples.of(mx.zeros((8, 4)), mx.array([0, 1, 2]))
    with pytest.raises(InputError, match=r"labels must be the classes' numbers.*float32 of shape"):
        Examples.of(mx.zeros((3, 4)), mx.array([0.0, 1.0, 2.0]))
    with pytest.raises(InputError, match=r"labels must be .* of shape \(3, 1\)"):
        Examples.of(mx.zeros((3, 4)), mx.array([[0], [1], [2]]))
    with pytest.raises(InputError, match="there are no examples"):
        Examples.of(mx.zeros((0, 4)), mx.zeros((0,), mx.int32))


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([], "there is no loss; name at least one"),
        (["hidden_mse:layers=0-3"], "there is no layer 3: Model has 3, 0 to 2"),
        (["hidden_mse:layers=2-0"], "there is no layer 2: Model has 2, 0 to 1"),
        (["hidden_mse:layers=model.nom-0"], "Model has no layer model.nom; it has "),
        (["flow_of_solution:layers=0-0"], "flow_of_solution needs at least two pairs of layers"),
        (["forward_kl", "no_kl"], "there is no loss no_kl; there are hard, forward_kl, "),
    ],
)
def test_objectives_that_cannot_be(tmp_path: Path, losses: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        run(tmp_path, small(), tiny_model("llama"), losses=losses)
    assert not checkpoints(tmp_path)


def test_calls_that_cannot_be(tmp_path: Path) -> None:
    for options, sentence in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"texts": []}, "there are no texts"),
        ({"weights": [1.0, 2.0]}, "2 weights do not fit 1 teachers"),
        ({"weights": [0.0]}, "teacher_weights must be above 0"),
        ({"mean": "median"}, "teacher_mean must be probs or logits, got median"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(tmp_path, small(), tiny_model("llama"), **options)
    with pytest.raises(InputError, match="there is no teacher; name at least one"):
        run(tmp_path, small(), [])
    with pytest.raises(InputError, match="forward_kl needs a teacher"):
        run(tmp_path, small(), None)
    with pytest.raises(InputError, match="hidden_mse compares features, so it needs a live"):
        run(tmp_path, small(), None, losses=["hidden_mse"])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_that_a_network_does_not_have(tmp_path: Path, who: str) -> None:
    """Their embeddings would be read from beyond the table."""
    student, teacher = small(vocab_size=97), tiny_model("llama")
    if who == "student":
        student = small(vocab_size=90)
    else:
        teacher = small(vocab_size=90, seed=1)
    texts = [*TEXTS, Text([1, 95, 3])]
    sentence = r"the texts hold token 9\d, but a Model of 90 tokens is to read them"
    with pytest.raises(InputError, match=sentence):
        run(tmp_path, student, teacher, texts)


def test_padded_heads_are_compared_in_their_shared_part(tmp_path: Path) -> None:
    teacher = small(vocab_size=V + 15, seed=1)
    batch = text_batch(TEXTS, [0, 1])
    made = make(["forward_kl", "sparse_kl"], batch, small(), LiveTeacher([teacher]))
    (note,) = made.notes
    assert note == (
        "the teacher's head has 112 entries, the student's 97: only the first 97 are compared"
    )
    done = run(tmp_path, small(), teacher, losses=["forward_kl", "sparse_kl"], valid=TEXTS[:2])
    assert done.notes == [note]
    assert done.log[-1]["held_out"]["kl"] >= 0
    assert not make(["hard", "sorted_l1"], batch, small(), LiveTeacher([teacher])).notes


def test_text_alone_teaches_the_labels(tmp_path: Path) -> None:
    done = run(tmp_path, small(), None, losses=["hard"], valid=TEXTS[:3])
    assert set(done.log[-1]["held_out"]) == {"nats", "perplexity"}
    assert done.log[-1]["loss"] == done.log[-1]["hard"]
    with pytest.raises(InputError, match="text alone holds no features"):
        TextTeacher().lesson(text_batch(TEXTS, [0]), [1])


# --------------------------------------------------------------------------------------- ensembles


def probs_of(logits: Any) -> np.ndarray:
    values = np.exp(np.array(logits).astype(np.float64))
    return values / values.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (1.0, 2.0, 5.0)])
@pytest.mark.parametrize("mean", ["probs", "logits"])
def test_mean_of_several_teachers(mean: str, weights: Sequence[float] | None) -> None:
    networks = [tiny_model("llama", seed=seed) for seed in range(3)]
    batch = text_batch(TEXTS, [0, 1])
    teacher = LiveTeacher(networks, True, weights, mean)
    lesson = teacher.lesson(batch, [1])
    goal = lesson.spell(*lesson.rows).logits
    assert goal is not None
    shares = np.array(weights or (1.0, 1.0, 1.0)) / sum(weights or (1.0, 1.0, 1.0))
    every = [network(batch.inputs) for network in networks]
    if mean == "probs":
        expected = sum(w * probs_of(one) for w, one in zip(shares, every, strict=True))
    else:
        mixed = sum(w * np.array(one) for w, one in zip(shares, every, strict=True))
        expected = probs_of(mixed)
    np.testing.assert_allclose(probs_of(goal), expected, atol=1e-6)
    _, features = module.Answers(networks[0], True).read(batch.inputs, [1])
    assert mx.array_equal(lesson.features[1], features[1]).item()


def test_mean_of_heads_of_other_widths() -> None:
    found = mean_logits([mx.zeros((2, 5)), mx.ones((2, 7))], [0.5, 0.5], "logits")
    assert found.shape == (2, 5)
    np.testing.assert_allclose(probs_of(found), 0.2)


def test_ensemble_teaches(tmp_path: Path) -> None:
    """A student of the mean itself has nothing to learn; weights and mean reach the teacher."""
    teachers = [tiny_model("llama"), tiny_model("llama", seed=1)]
    losses = ["forward_kl"]
    one = run(tmp_path / "1", tiny_model("llama"), teachers, losses=losses, weights=[1.0, 1e-9])
    assert abs(one.log[0]["loss"]) < 1e-5
    both = run(tmp_path / "2", tiny_model("llama"), teachers, losses=losses)
    other = run(tmp_path / "3", tiny_model("llama"), teachers, losses=losses, mean="logits")
    assert both.log[0]["loss"] > 0.1
    assert other.log[0]["loss"] != pytest.approx(both.log[0]["loss"], rel=1e-3)


# ------------------------------------------------------------------------------ the teacher's cache


def make_cache(folder: Path, teacher: Any, texts: Sequence[Text], k: int) -> CachedTeacher:
    size = teacher(mx.array([[1]])).shape[-1]
    header = {"tokenizer_hash": "abc", "weights_hash": "def", "vocab_size": size}
    list(write_cache(folder, module.Answers(teacher, True), texts, header, k, texts_per_shard=5))
    return CachedTeacher(TeacherCache.open(folder, "abc", texts))


def test_cached_teacher_teaches_as_the_live_one(tmp_path: Path) -> None:
    """All tokens are kept, in half precision."""
    teacher = tiny_model("llama")
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, V)
    live = run(tmp_path / "live", small(), teacher, losses=["forward_kl"])
    found = run(tmp_path / "cached", small(), cached, losses=["sparse_kl"])
    for ours, theirs in zip(found.log, live.log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["count"] == theirs["count"]


def test_cached_teacher_of_some_tokens_against_the_live_one(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, 8)
    batch = text_batch(TEXTS, [7, 0, 2])
    live = make(["sparse_kl:k=8"], batch, small(), LiveTeacher([teacher]))
    ours = make(["sparse_kl"], batch, small(), cached)
    total, count, grads = value_and_grads(live, batch)
    found, same, others = value_and_grads(ours, batch)
    assert same == count
    assert found == pytest.approx(total, rel=5e-3)
    assert_close(others, grads, 2e-2)


def test_cache_judges_nothing_but_its_own_texts(tmp_path: Path) -> None:
    cached = make_cache(tmp_path / "cache", tiny_model("llama"), TEXTS[:6], 8)
    held_out = make_texts(20, seed=9)  # more than the cache has rows
    done = run(tmp_path, small(), cached, TEXTS[:6], losses=["sparse_kl"], valid=held_out)
    assert set(done.log[-1]["held_out"]) == {"nats", "perplexity"}
    judge = LiveTeacher([tiny_model("llama")])
    options = {"losses": ["sparse_kl"], "valid": held_out, "valid_teacher": judge}
    done = run(tmp_path / "judged", small(), cached, TEXTS[:6], **options)
    assert set(done.log[-1]["held_out"]) == {"nats", "kl", "agreement", "perplexity"}


def test_cache_cannot_give_all_logits(tmp_path: Path) -> None:
    cached = make_cache(tmp_path / "cache", tiny_model("llama"), TEXTS, 8)
    sentence = "forward_kl needs all of the teacher's logits, and a cache has the top ones; use spa"
    with pytest.raises(InputError, match=sentence):
        run(tmp_path / "1", small(), cached)
    with pytest.raises(InputError, match="hidden_mse compares features, so it needs a live"):
        run(tmp_path / "2", small(), cached, losses=["sparse_kl", "hidden_mse"])
    with pytest.raises(InputError, match="a cache holds no features; losses on features need a"):
        cached.lesson(text_batch(TEXTS, [0]), [1])
    with pytest.raises(InputError, match="a cache does not know what the student will write"):
        run(tmp_path / "3", small(), cached, losses=["sparse_kl"], on_policy=HALF)
    assert not list(tmp_path.glob("*/step-*"))


def test_cache_of_a_wider_teacher(tmp_path: Path) -> None:
    teacher = small(vocab_size=V + 31, seed=1)
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, 64)
    done = run(tmp_path, small(), cached, losses=["sparse_kl"])
    assert all(math.isfinite(row["loss"]) for row in done.log)


# --------------------------------------------------------------------------- another tokenizer


@pytest.fixture(scope="module")
def ours() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Return a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=False
    )
    return TokenizerWrapper(fast)


STORY = "Once upon a time there was a red kite."


def told(tokenizer: Any, prompt: str, answer: str, ends: bool = True) -> Text:
    asked = tokenizer.encode(prompt)
    answered = tokenizer.encode(answer, add_special_tokens=False)
    return Text.behind([*asked, *answered, *([tokenizer.eos_token_id] * ends)], len(asked))


def begins(tokenizer: Any, tokens: list[int]) -> dict[int, int]:
    """Return which token begins at each character, found by decoding all that is before it."""
    decoded = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens))]
    return {len(text): n for n, text in enumerate(decoded) if not text.endswith("\ufffd")}


def test_other_tokenizers_tokens_are_aligned(ours: Any, theirs: Any) -> None:
    """A learned token meets what the teacher says where a token of its own begins, too."""
    network = small(vocab_size=258, seed=1)
    texts = [told(ours, "Once upon a time", " there was a dog."), told(ours, "Hi", " Lily!")]
    batch = text_batch(texts, [0, 1])
    hidden, known = RetokenizedTeacher(network, ours, theirs).lesson(batch).rows
    for row, story in enumerate(("Once upon a time there was a dog.", "Hi Lily!")):
        own = [*theirs.encode(story), theirs.eos_token_id]
        expected = module.Answers(network, True).hidden(mx.array([own]))[0]
        there = begins(theirs, own)
        places = {n - 1: there[at] - 1 for at, n in begins(ours, texts[row].tokens).items()}
        learned = np.flatnonzero(np.array(batch.mask[row])).tolist()
        assert known[row].sum().item() == len(learned) >= 3
        for place in learned:
            assert known[row, place].item() == 1
            np.testing.assert_allclose(hidden[row, place], expected[places[place]], atol=1e-5)


def test_other_tokenizer_without_a_beginning_says_nothing_of_the_first_token(
    ours: Any, theirs: Any
) -> None:
    """The student predicts the first word from its beginning-of-text token; bytes have none."""
    assert theirs.encode("") == []
    text = told(ours, "", STORY)
    assert text.tokens[0] == ours.bos_token_id
    teacher = RetokenizedTeacher(small(vocab_size=258, seed=1), ours, theirs)
    known = teacher.lesson(text_batch([text], [0])).rows[1]
    assert known[0, 0].item() == 0
    assert known[0, 1 : text.num_learned].tolist() == [1.0] * (text.num_learned - 1)
    assert not known[0, text.num_learned :].any().item()


def test_teacher_of_fewer_tokens_says_nothing_within_them(ours: Any, theirs: Any) -> None:
    """The student reads bytes, the teacher words."""
    text = Text([0, *theirs.encode(STORY), 1])
    batch = text_batch([text], [0])
    teacher = small(vocab_size=4096, seed=1)
    known = RetokenizedTeacher(teacher, theirs, ours).lesson(batch).rows[1]
    own = [*ours.encode(STORY), ours.eos_token_id]
    there = set(begins(ours, own)) & set(begins(theirs, text.tokens))
    assert len(there) < len(STORY) // 2
    assert known.sum().item() == len(there)


def test_sorted_distributions_are_learned_from_another_tokenizer(
    ours: Any, theirs: Any, tmp_path: Path
) -> None:
    student, network = small(vocab_size=4096), small(vocab_size=258, seed=1)
    stories = (STORY, "Ben had a dog.", "Lily saw a big cat in the park and ran.")
    texts = [told(ours, "", story) for story in stories]
    teacher = RetokenizedTeacher(network, ours, theirs)
    done = run(
        tmp_path,
        student,
        teacher,
        texts,
        losses=["sorted_l1", "hard:weight=0.1"],
        valid=texts,
        training={"steps": 30, "checkpoint_every": 30},
    )
    losses = [row["sorted_l1"] for row in done.log]
    assert all(0 <= loss <= 2 for loss in losses)
    assert set(done.log[-1]["held_out"]) == {"nats", "perplexity"}
    # Against the loss by hand, of the first text.
    batch = text_batch(texts, [0])
    made = make(["sorted_l1"], batch, small(vocab_size=4096), teacher)
    _, _, parts = made.loss(made.teach(batch))
    own = [*theirs.encode(STORY), theirs.eos_token_id]
    ours_at = made.network.student(batch.inputs)[0]
    theirs_at = network(mx.array([own]))[0]
    there = begins(theirs, own)
    pairs = [(n - 1, there[at] - 1) for at, n in begins(ours, texts[0].tokens).items() if at]
    expected = sum(
        response.sorted_l1(log_probs(ours_at[p]), log_probs(theirs_at[q])).item() for p, q in pairs
    )
    count = len(texts[0].tokens) - 1
    assert parts["sorted_l1"].item() == pytest.approx(expected / count, rel=1e-4)
    with pytest.raises(InputError, match="features of another tokenizer's tokens cannot be"):
        teacher.lesson(batch, [0])


# ------------------------------------------------------------------------------------------ images


def test_larger_features_are_averaged() -> None:
    x = mx.arange(2 * 4 * 6 * 3, dtype=mx.float32).reshape(2, 4, 6, 3)
    y = mx.ones((2, 2, 3, 5))
    ours, theirs = same_places(x, y)
    assert ours.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(theirs, y)
    expected = np.array(x).reshape(2, 2, 2, 3, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(ours, expected)
    back, again = same_places(y, x)
    np.testing.assert_allclose(back, y)
    np.testing.assert_allclose(again, expected)
    tall, wide = same_places(mx.ones((2, 8, 2, 3)), mx.ones((2, 2, 6, 3)))
    assert tall.shape == wide.shape == (2, 2, 2, 3)


def test_features_that_do_not_fit() -> None:
    same = mx.ones((2, 3, 3, 4))
    assert same_places(same, same)[0] is same
    flat = mx.ones((2, 7))
    assert same_places(flat, same) == (flat, same)
    with pytest.raises(InputError, match=r"features of \(3, 3\) and \(2, 3\) places do not fit"):
        same_places(same, mx.ones((2, 2, 3, 4)))


# ---------------------------------------------------------------------------------- what it writes


def rollouts(folder: Path, student: Any, texts: Sequence[Text] = TEXTS, **options: Any) -> Rollouts:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"rollout_every": 4, "rollout_texts": 5, "rollout_max_tokens": 9}
    config = OnPolicyConfig(**{"on_policy": 1.0, **sizes, **options})
    return Rollouts(student, texts, lambda number: [number % 12, 1], 3, EOS, config, folder, 7)


EOS = set(range(0, V, 10))


def same(one: TextBatch, other: TextBatch) -> bool:
    return one.tokens.shape == other.tokens.shape and bool(
        (mx.array_equal(one.tokens, other.tokens) & mx.array_equal(one.mask, other.mask)).item()
    )


def test_batches_follow_from_step_and_weights(tmp_path: Path) -> None:
    student = small()
    first = [rollouts(tmp_path / "a", student).batch(n) for n in range(10)]
    mx.random.seed(99)
    again = rollouts(tmp_path / "b", small())
    assert all(same(again.batch(n), one) for n, one in enumerate(first))
    kept = rollouts(tmp_path / "a", small(seed=8))  # what was written stands
    assert all(same(kept.batch(n), one) for n, one in enumerate(first))
    other = rollouts(tmp_path / "c", tiny_model("llama"))
    assert not any(same(other.batch(n), one) for n, one in enumerate(first))
    assert student.training


def test_share_of_batches_that_the_student_writes(tmp_path: Path) -> None:
    none = rollouts(tmp_path / "0", small(), on_policy=0.0)
    assert [none.batch(n).rows for n in range(40)] == [[n % 12, 1] for n in range(40)]
    assert not list((tmp_path / "0").iterdir())
    every = rollouts(tmp_path / "1", small(), on_policy=1.0)
    assert all(every.batch(n).rows == [] for n in range(9))
    half = rollouts(tmp_path / "h", small(), on_policy=0.5, rollout_every=50)
    count = sum(half.batch(n).rows == [] for n in range(100))
    assert 35 < count < 65


def test_texts_end_where_the_student_ends_them(tmp_path: Path) -> None:
    writer = rollouts(tmp_path, small(), rollout_texts=12, rollout_prompt_tokens=4)
    writer.batch(0)
    rows = rows_of(tmp_path / "rollouts-0000000.jsonl")
    assert len(rows) == 12
    ended = 0
    for row in rows:
        answer = row["tokens"][row["start"] :]
        assert 1 <= len(answer) <= 9
        assert not any(token in EOS for token in answer[:-1])
        assert answer[-1] in EOS or len(answer) == 9
        ended += answer[-1] in EOS and len(answer) < 9
        begun = [t for t in TEXTS if t.tokens[: row["start"]] == row["tokens"][: row["start"]]]
        assert begun  # it continues one of the data
        start = begun[0].learned.index(True)
        assert row["start"] == (start if start > 1 else 4)
    assert ended


def test_masks_of_written_texts_begin_behind_the_prompt(tmp_path: Path) -> None:
    texts = [Text(text.tokens) for text in TEXTS]
    writer = rollouts(tmp_path, small(), texts, rollout_prompt_tokens=3, replay=1)
    batch = writer.batch(2)
    rows = rows_of(tmp_path / "rollouts-0000000.jsonl")
    for tokens, mask in zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True):
        (row,) = [row for row in rows if tokens[: len(row["tokens"])] == row["tokens"]]
        expected = [2 <= place < len(row["tokens"]) - 1 for place in range(len(mask))]
        assert [bool(one) for one in mask] == expected


def test_earlier_sets_are_replayed(tmp_path: Path) -> None:
    writer = rollouts(tmp_path, small(), replay=2, rollout_every=2, rollout_texts=3)
    for number in range(7):
        writer.batch(number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"rollouts-000000{n}.jsonl" for n in (0, 2, 4, 6)]
    sets = {name: [tuple(row["tokens"]) for row in rows_of(tmp_path / name)] for name in names}
    seen = set()
    for number in range(20, 24):  # nothing was written at 18: only the last set is there
        batch = writer.batch(number)
        seen |= {tuple(t for t in row if t) for row in batch.tokens.tolist()}
    assert not seen & {tuple(t for t in x if t) for x in sets[names[0]]}
    both = set()
    for number in (6, 7):
        both |= {tuple(t for t in row if t) for row in writer.batch(number).tokens.tolist()}
    known = {tuple(t for t in x if t) for name in names[2:] for x in sets[name]}
    assert both <= known


class Killed(Exception):
    pass


class KillAt:
    """A callback that stands in for a kill."""

    def __init__(self, step: int):
        self.step = step

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] == self.step:
            raise Killed

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("step", [2, 5])
def test_killed_training_on_its_own_texts_ends_with_the_same_bits(
    tmp_path: Path, step: int
) -> None:
    options: dict[str, Any] = {
        "losses": ["reverse_kl", "hidden_mse:weight=0.1"],
        "on_policy": OnPolicyConfig(
            on_policy=0.6, rollout_every=3, rollout_texts=4, rollout_max_tokens=6
        ),
        "eos_token_ids": [0],
        "valid": TEXTS[:2],
        "training": {"steps": 8, "accumulate": 2, "checkpoint_every": 3},
    }
    whole = small()
    expected = run(tmp_path / "whole", whole, tiny_model("llama"), **options)
    with pytest.raises(Killed):
        run(tmp_path / "parts", small(), tiny_model("llama"), callback=KillAt(step), **options)
    parts = small()
    mx.random.seed(123)
    done = run(tmp_path / "parts", parts, tiny_model("llama"), **options)
    assert bits(parts) == bits(whole)
    assert done.log == expected.log
    written = sorted(path.name for path in (tmp_path / "whole").glob("rollouts-*"))
    assert len(written) > 2
    for name in written:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"on_policy": 1.5}, "on_policy must be between 0 and 1, got 1.5"),
        ({"on_policy": -0.1}, "on_policy must be at least 0, got -0.1"),
        ({"rollout_every": 0}, "rollout_every must be at least 1, got 0"),
        ({"rollout_texts": 0}, "rollout_texts must be at least 1, got 0"),
        ({"rollout_prompt_tokens": 0}, "rollout_prompt_tokens must be at least 1, got 0"),
        ({"rollout_max_tokens": 0}, "rollout_max_tokens must be at least 1, got 0"),
        ({"replay": 0}, "replay must be at least 1, got 0"),
        (
            {"rollout_temperature": -1.0},
            "rollout_temperature must be 0, or between 1e-6 and 100",
        ),
    ],
)
def test_settings_of_rollouts_that_mean_nothing(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        OnPolicyConfig(**fields)


# ---------------------------------------------------------------------------------------- the log


class Recorder:
    """Keeps what mlx-lm's callbacks are told."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.val: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.val.append(info)


def test_callbacks_are_told_what_mlx_lm_tells(tmp_path: Path) -> None:
    heard = Recorder()
    done = run(tmp_path, small(), tiny_model("llama"), valid=TEXTS[:3], callback=heard)
    assert [info["iteration"] for info in heard.train] == [1, 2, 3, 4, 5, 6]
    keys = {"iteration", "train_loss", "learning_rate", "iterations_per_second"}
    keys |= {"tokens_per_second", "trained_tokens", "peak_memory"}
    assert all(keys | {"forward_kl"} == set(info) for info in heard.train)
    assert [info["train_loss"] for info in heard.train] == [row["loss"] for row in done.log]
    counts = np.cumsum([row["count"] for row in done.log])
    assert [info["trained_tokens"] for info in heard.train] == counts.tolist()
    assert [info["iteration"] for info in heard.val] == [3, 6]
    assert all(
        {"iteration", "val_loss", "nats", "kl", "agreement", "perplexity"} == set(info)
        for info in heard.val
    )
    assert heard.val[-1]["val_loss"] == done.log[-1]["held_out"]["nats"]


@pytest.mark.parametrize("step", [4, 5])
def test_killed_training_counts_on(tmp_path: Path, step: int) -> None:
    """Neither the log nor the number of tokens begins again; step 3 was logged, and not kept."""
    whole = run(tmp_path / "whole", small(), tiny_model("llama"), valid=TEXTS[:2])
    with pytest.raises(Killed):
        run(
            tmp_path / "parts", small(), tiny_model("llama"), valid=TEXTS[:2], callback=KillAt(step)
        )
    heard = Recorder()
    done = run(tmp_path / "parts", small(), tiny_model("llama"), valid=TEXTS[:2], callback=heard)
    assert done.log == whole.log
    done_before = 2 if step == 4 else 4
    assert [info["iteration"] for info in heard.train] == list(range(done_before + 1, 7))
    total = sum(row["count"] for row in whole.log)
    assert heard.train[-1]["trained_tokens"] == total
    assert rows_of(tmp_path / "parts" / "log.jsonl") == done.log


def test_a_log_that_a_kill_cut_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", small(), tiny_model("llama"))
    with pytest.raises(Killed):
        run(tmp_path / "parts", small(), tiny_model("llama"), callback=KillAt(5))
    log = tmp_path / "parts" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-7])
    assert run(tmp_path / "parts", small(), tiny_model("llama")).log == whole.log
    assert rows_of(log) == whole.log


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    """The second one is told, and leaves the first one's files alone."""

    class Second:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 3:
                with pytest.raises(InputError, match="is being written by another run"):
                    run(tmp_path, small(), tiny_model("llama"))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    done = run(tmp_path, small(), tiny_model("llama"), callback=Second())
    assert [row["step"] for row in done.log] == [1, 2, 3, 4, 5, 6]


def test_the_best_weights_are_kept_and_patience_ends(tmp_path: Path) -> None:
    """A rate that is far too high: the first evaluation is the best one."""
    steps = {"steps": 30, "learning_rate": 3e-2, "evaluate_every": 2, "checkpoint_every": 50}
    training = {**steps, "patience": 2, "keep_best": True, "warmup": 1.0}
    student = small()
    done = run(tmp_path, student, tiny_model("llama"), valid=make_texts(6, 9), training=training)
    judged = {row["step"]: row["held_out"]["kl"] for row in done.log if "held_out" in row}
    best = min(judged, key=lambda step: judged[step])
    assert done.finished
    assert done.log[-1]["step"] == best + 4 < 30
    again = small()
    found = run(tmp_path, again, tiny_model("llama"), valid=make_texts(6, 9), training=training)
    assert found.log == done.log
    assert bits(again) == bits(student)
    teacher = LiveTeacher([tiny_model("llama")])
    made = make(["forward_kl"], text_batch(TEXTS, [0]), student, teacher)
    kl = made.evaluate([text_batch(make_texts(6, 9), list(range(6)))])["kl"]
    assert kl == pytest.approx(judged[best], rel=1e-4)
    with pytest.raises(InputError, match="patience and keep_best need held-out data"):
        run(tmp_path / "other", small(), tiny_model("llama"), training=training)


# -------------------------------------------------------------- rates, scales of terms, two threads


@pytest.mark.parametrize(
    ("trained", "rate"),
    [("new weights", 1e-3), ("chosen layers", 2.5e-4), (None, 3e-5), ("adapters", 1e-4)],
)
def test_learning_rate_by_what_is_trained(tmp_path: Path, trained: str | None, rate: float) -> None:
    student = small()
    if trained == "adapters":
        AdapterConfig(fine_tune="lora").apply(student)
    training = TrainingConfig(steps=1, warmup=1.0)
    said = None if trained == "adapters" else trained
    options = {"folder": tmp_path, "training": training, "quiet": True, "trained": said}
    (row,) = distill(student, tiny_model("llama"), TEXTS, **options).log
    assert row["learning_rate"] == pytest.approx(rate)


def test_learning_rate_of_a_classifier(tmp_path: Path) -> None:
    data = Examples.of(mx.random.normal((4, 4)), mx.array([0, 1, 2, 0]))
    training = TrainingConfig(steps=1, warmup=1.0)
    done = distill(
        nn.Linear(4, 3), nn.Linear(4, 3), data, folder=tmp_path, training=training, quiet=True
    )
    assert done.log[0]["learning_rate"] == pytest.approx(1e-3)


def test_a_term_that_drowns_another_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = ["forward_kl", "hard:weight=0.001"]
    done = run(tmp_path / "one", small(), tiny_model("llama"), losses=losses, quiet=False)
    first = done.log[0]
    share = first["forward_kl"] / (first["forward_kl"] + 0.001 * first["hard"])
    assert f"forward_kl {share:.1%}, hard {1 - share:.1%}" in capsys.readouterr().err
    (note,) = done.notes
    assert note.startswith(f"forward_kl was {share:.1%} of the first step's loss and hard ")
    balanced = ["forward_kl", f"hard:weight={first['forward_kl'] / first['hard'] / 5}"]
    assert not run(tmp_path / "two", small(), tiny_model("llama"), losses=balanced).notes


def test_a_training_in_another_thread_is_refused(tmp_path: Path) -> None:
    """MLX's random state is the process's: what one draws, the other would not."""
    alone = run(tmp_path / "alone", small(), tiny_model("llama"))
    said: list[str] = []

    def second() -> None:
        with pytest.raises(InputError) as refusal:
            run(tmp_path / "second", small(), tiny_model("llama"))
        said.append(str(refusal.value))

    class Starting:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 3:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    done = run(tmp_path / "first", small(), tiny_model("llama"), callback=Starting())
    assert done == alone
    assert "another thread of this process is training" in said[0]
    assert not (tmp_path / "second").exists()


def test_the_example_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    guide = (root / "docs" / "distillation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "models").symlink_to(bundled("stories-4m").parent)
    (tmp_path / "texts").mkdir()
    for name, text in (("train", "Once upon a time"), ("valid", "There was a girl")):
        row = json.dumps({"text": text}) + "\n"
        (tmp_path / "texts" / f"{name}.jsonl").write_text(row)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace("steps=20", "steps=1"), found)
    assert found["done"].finished
    written, _ = mlx_lm.load("student")
    assert bits(written).keys() == bits(found["student"]).keys()
