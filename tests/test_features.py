"""What is seen inside networks, against what is computed by hand."""

import contextlib
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.distillation.features import uniform_map
from mlx_distill.errors import InputError
from mlx_distill.target.layers import layer_list, numbered_layers
from mlx_distill.target.reading import read_whole
from mlx_distill.target.taps import find_layer, tapped
from mlx_distill.target.target import Target

TOKENS = mx.array([[5, 9, 33, 2, 7], [60, 1, 1, 4, 90]])


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def by_hand(model: Any, tokens: mx.array) -> list[mx.array]:
    """Return the outputs of all layers of a llama."""
    hidden = model.model.embed_tokens(tokens)
    outputs = []
    for layer in model.model.layers:
        hidden = layer(hidden, "causal", None)
        outputs.append(hidden)
    return outputs


def test_tapped_outputs_equal_those_by_hand(llama: Any) -> None:
    layers = [0, -1, "model.layers.2", "model.norm", "model.layers.1.mlp"]
    with tapped(llama, layers) as outputs:
        logits = llama(TOKENS)
    expected = by_hand(llama, TOKENS)
    assert set(outputs) == set(layers)
    np.testing.assert_allclose(outputs[0], expected[0], atol=1e-5)
    for layer in (-1, "model.layers.2"):  # one layer under two names
        np.testing.assert_allclose(outputs[layer], expected[2], atol=1e-5)
    np.testing.assert_allclose(outputs["model.norm"], llama.model.norm(expected[2]), atol=1e-5)
    np.testing.assert_allclose(logits, llama(TOKENS), atol=1e-6)


def test_first_of_several_outputs_is_the_feature() -> None:
    class Pair(nn.Module):
        def __call__(self, x: mx.array) -> tuple[mx.array, str]:
            return x + 1, "state"

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Pair()

        def __call__(self, x: mx.array) -> mx.array:
            return self.first(x)[0] * 2

    network = Two()
    with tapped(network, ["first"]) as outputs:
        assert network(mx.array([1.0])).item() == 4
    assert outputs["first"].item() == 2


def test_gradients_flow_through_tapped_layers(llama: Any) -> None:
    def feature(model: Any) -> mx.array:
        with tapped(model, [1]) as outputs:
            model(TOKENS)
        return mx.square(outputs[1]).sum()

    def plain(model: Any) -> mx.array:
        return mx.square(by_hand(model, TOKENS)[1]).sum()

    found, expected = (
        dict(tree_flatten(value_and_grad(llama, loss)(llama)[1])) for loss in (feature, plain)
    )
    assert found["model.layers.1.mlp.up_proj.weight"].any().item()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (3, "there is no layer 3: Model has 3, 0 to 2"),
        (-4, "there is no layer -4: Model has 3, 0 to 2"),
        ("model.layers.9", "Model has no layer model.layers.9; it has "),
        ("", "Model has no layer ; it has "),
    ],
)
def test_layer_that_does_not_exist(llama: Any, layer: int | str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        find_layer(llama, layer)


def test_network_without_numbered_layers() -> None:
    with pytest.raises(InputError, match="Linear has no list of layers; name them instead"):
        find_layer(nn.Linear(2, 2), 0)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (1, 3, [(0, 2)]),
        (2, 4, [(0, 1), (1, 3)]),
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (3, 12, [(0, 3), (1, 7), (2, 11)]),
        (4, 6, [(0, 1), (1, 2), (2, 3), (3, 5)]),
        (6, 2, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]),
    ],
)
def test_layers_are_spread_evenly(
    student: int, teacher: int, expected: list[tuple[int, int]]
) -> None:
    assert uniform_map(student, teacher) == expected


def test_spread_layers_exist_and_rise() -> None:
    for student in range(1, 20):
        for teacher in range(1, 20):
            goals = [goal for _, goal in uniform_map(student, teacher)]
            assert goals == sorted(goals)
            assert goals[-1] == teacher - 1
            assert min(goals) >= 0


def test_taps_end_with_an_exception(llama: Any) -> None:
    with contextlib.suppress(RuntimeError), tapped(llama, [0, 1, "model.norm"]) as outputs:
        llama(TOKENS)
        raise RuntimeError("in between")
    seen = dict(outputs)
    llama(TOKENS[:, :2])
    assert outputs == seen
    assert [output.shape[1] for output in outputs.values()] == [5, 5, 5]
    with pytest.raises(InputError), tapped(llama, [0, 7]):
        pass


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "model.h"),
        ("gemma3", "language_model.model.layers"),
        ("gemma3n", "model.language_model.layers"),
        ("dbrx", "transformer.blocks"),
        ("plamo", "model.layers.layers"),
        ("talkie", "model.blocks"),
        ("longcat_flash_ngram", "model.layers"),  # another list is longer
    ],
)
def test_where_a_model_keeps_its_layers(name: str, path: str) -> None:
    model = tiny_model(name)
    found, layers = layer_list(model)
    assert found == path
    assert [id(layer) for layer in layers] == [id(layer) for layer in model.layers]
    assert find_layer(model, 1) is model.layers[1]


def test_layers_in_two_lists_are_counted_as_the_model_does() -> None:
    model = tiny_model("afm7")
    assert len(numbered_layers(model)) == len(model.layers) == 3
    path, layers = layer_list(model)
    assert (path, len(layers)) == ("model.layers", 2)


def test_layers_of_a_network_that_has_no_property_for_them() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = [nn.Linear(2, 2)]
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert layer_list(Deep())[0] == "inner.layers"
    with pytest.raises(InputError, match="Linear has no list of layers"):
        layer_list(nn.Linear(2, 2))


def test_layers_are_tapped_while_a_tree_is_verified() -> None:
    model = tiny_model("llama")
    target = Target.of(model)
    caches = make_prompt_cache(model)
    target.forward(mx.array([5, 9, 33]), caches)
    with tapped(target.model, [0, 2]) as outputs:
        target.verify(PrefixTree.from_beams([[1, 2], [1, 4]]), caches)
    with tapped(target.model, [0, 2]) as expected:
        read_whole(model, mx.array([[5, 9, 33, 1, 4]]))
    for layer in (0, 2):
        np.testing.assert_allclose(outputs[layer][0, 2], expected[layer][0, -1], atol=1e-4)
