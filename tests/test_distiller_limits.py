"""What a distiller refuses, and what it compares where shapes differ."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distillers import (
    HALF,
    TEXTS,
    V,
    make,
    run,
    small,
)
from mlx import nn
from mlx.utils import tree_flatten
from tiny_models import tiny_model

from mlx_distill import Examples, InputError
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation.comparison import same_places
from mlx_distill.distillation.distiller import Distiller
from mlx_distill.distillation.parts import quantize
from mlx_distill.distillation.teachers import (
    LiveTeacher,
    TextTeacher,
)
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.gradients import Gradients


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


@pytest.mark.parametrize(
    "losses",
    [
        *(["hard"], ["hidden_mse"], ["attention_transfer"], ["relational_distance"]),
        *(["contrastive"], ["hard:weight=0.5", "relational_angle", "flow_of_solution"]),
    ],
)
def test_weights_may_be_shares_and_nothing(losses: list[str]) -> None:
    """Weights of one sum count as their multiples do; examples of no weight are not there."""
    mx.random.seed(0)
    student, teacher = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2))
    inputs, labels = mx.random.normal((6, 4)), mx.array([0, 1, 2, 0, 1, 2])
    weights = mx.array([0.125, 0, 0.25, 0.125, 0, 0.125])
    kept = mx.array([0, 2, 3, 5])
    shares = Examples(inputs, labels, weights, list(range(6)))
    whole = Examples(inputs[kept], labels[kept], 8 * weights[kept], list(range(4)))
    terms = [LossTerm.parse(loss) for loss in losses]
    found = []
    for data in (shares, whole):
        distiller = Distiller(student, LiveTeacher([teacher], False), terms, data, 6, 0)
        gradients = Gradients(distiller.network, distiller.loss, has_float16=False)
        sums = gradients.sums([distiller.teach(data)])
        numbers: dict[str, Any] = dict(tree_flatten(sums.mean_gradients()))
        found.append((sums.means(), distiller.evaluate([data]), numbers))
    (means, judged, slopes), (others, expected, wanted) = found
    assert means[0] == pytest.approx(others[0], rel=1e-5)
    assert means[1] == pytest.approx(others[1], rel=1e-5)
    assert judged == pytest.approx(expected, rel=1e-5)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, wanted[name], rtol=1e-4, atol=1e-6)


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
    with pytest.raises(InputError, match="the texts hold token -3"):
        run(tmp_path, student, teacher, [Text([1, -3, 3])])


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


def test_a_quantised_teacher_is_not_quantised_again() -> None:
    teacher = tiny_model("llama")
    nn.quantize(teacher, group_size=32, bits=8)
    quantize(teacher, None)
    with pytest.raises(InputError, match="quantised already; leave teacher_bits away"):
        quantize(teacher, 4)
