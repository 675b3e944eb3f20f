"""Activations that are computed twice: the same values and gradients, caches included."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.target.reading import read_whole

TOKENS = mx.array([[5, 9, 33, 2, 7], [60, 1, 1, 4, 90]])


def gradients(model: Any) -> tuple[float, dict[str, mx.array]]:
    def loss(model: Any) -> mx.array:
        return mx.logsumexp(read_whole(model, TOKENS), axis=-1).sum()

    value, found = value_and_grad(model, loss)(model)
    return value.item(), dict(tree_flatten(found))


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("llama", False),
        ("llama", True),
        ("gemma2", False),
        ("gemma3n", False),  # layers read others' keys out of the cache
        ("gemma4_text", False),  # and here they are handed on
        ("qwen3_5", False),  # states of recurrent layers
        ("falcon_h1", False),  # several caches a layer
    ],
)
def test_activations_that_are_computed_twice_give_the_same_gradients(
    name: str, frozen: bool
) -> None:
    student, teacher = tiny_model(name), tiny_model(name, seed=1)
    student.train()
    if frozen:
        student.freeze()
        student.model.layers[1].mlp.unfreeze()
    value, expected = gradients(student)
    answers = teacher(TOKENS)
    names = set(dict(tree_flatten(student.parameters())))
    checkpoint_layers(student)
    again, found = gradients(student)
    assert again == pytest.approx(value, rel=1e-6)
    assert set(found) == set(expected)
    for path, gradient in expected.items():
        scale = max(1.0, mx.abs(gradient).max().item())
        np.testing.assert_allclose(found[path], gradient, atol=1e-5 * scale, err_msg=path)
    assert set(dict(tree_flatten(student.parameters()))) == names
    assert mx.array_equal(teacher(TOKENS), answers).item()


def test_layers_that_compute_twice_write_with_a_cache() -> None:
    student = tiny_model("llama")
    expected = student(TOKENS)
    checkpoint_layers(student)
    for training in (False, True):
        student.train(training)
        cache = make_prompt_cache(student)
        student(TOKENS[:, :3], cache=cache)
        found = student(TOKENS[:, 3:], cache=cache)
        assert cache[0].offset == 5
        np.testing.assert_allclose(found, expected[:, 3:], atol=1e-5)
