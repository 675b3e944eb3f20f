"""Layers whose operations are joined: found by their code, and they say what they said."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.kernels.choice import forced, performing
from mlx_distill.target.joined_layers import NAMES
from mlx_distill.target.target import Target

TREE = PrefixTree.from_beams([[1, 2, 3, 9], [1, 4, 5], [1, 2, 7, 8], [1, 6]])


def asked_for(model: nn.Module) -> set[str]:
    """Return what a tree's call asks for that joins operations; the twins must say the same."""
    target, used = Target.of(model), set()

    def noting(operation: Any, *args: Any, **options: Any) -> Any:
        used.add(operation.name)
        return operation.twin(*args, **options)

    expected = target.verify(TREE, _read(model))
    with forced(), performing(noting):
        found = target.verify(TREE, _read(model))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    return used & NAMES


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
def test_layers_of_known_code_are_joined(name: str) -> None:
    assert asked_for(tiny_model(name)) == NAMES


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "qwen3_moe", "stablelm"])
def test_layers_of_other_code_are_not(name: str) -> None:
    assert not asked_for(tiny_model(name))


def test_layers_that_are_given_adapters_later_are_not() -> None:
    model = tiny_model("llama")
    assert asked_for(model)
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 4.0, "dropout": 0.0})
    for module in model.modules():
        if "lora_b" in module:
            module["lora_b"] = mx.ones_like(module["lora_b"]) / 8
    assert not asked_for(model)


def _read(model: nn.Module) -> list[Any]:
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[5, 9, 33, 2]]), cache=caches))
    return caches
