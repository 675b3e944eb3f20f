"""Whole texts are read with caches, which cost nothing and change no gradient."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.target.reading import fresh_caches, read_whole, vocab_width

TOKENS = mx.array([[5, 9, 33, 2, 7, 8, 1, 2, 3, 4, 5, 6], [60, 1, 1, 4, 90, 1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma3_text", "qwen3_5", "falcon_h1"])
def test_whole_texts_are_read_as_prompts_are(name: str) -> None:
    model = tiny_model(name)
    expected = model(TOKENS, cache=make_prompt_cache(model))
    np.testing.assert_array_equal(read_whole(model, TOKENS), expected)


def test_a_model_that_shares_keys_through_its_cache_needs_one() -> None:
    model = tiny_model("gemma3n")
    logits = read_whole(model, TOKENS)
    assert mx.abs(model(TOKENS) - logits).max().item() > mx.std(logits).item()


@pytest.mark.parametrize("name", ["llama", "llama-sliding", "qwen3_next"])
def test_gradients_flow_through_fresh_caches(name: str) -> None:
    model = tiny_model(name)

    def gradients(with_caches: bool) -> dict[str, mx.array]:
        def loss(model: nn.Module) -> mx.array:
            logits = read_whole(model, TOKENS) if with_caches else model(TOKENS)
            return mx.square(mx.logsumexp(logits, axis=-1)).sum()

        return dict(tree_flatten(value_and_grad(model, loss)(model)[1]))

    found = gradients(True)
    for path, gradient in gradients(False).items():
        scale = max(1.0, mx.abs(gradient).max().item())
        np.testing.assert_allclose(found[path], gradient, atol=1e-5 * scale, err_msg=path)


def test_gradients_of_shared_keys_equal_finite_differences() -> None:
    model = tiny_model("gemma3n")
    own = model.model.language_model.layers[0].self_attn.k_proj

    def loss(weight: mx.array) -> mx.array:
        own.weight = weight
        return mx.square(mx.logsumexp(read_whole(model, TOKENS), axis=-1)).mean()

    weight, step = own.weight, 2e-3
    gradient = mx.grad(loss)(weight)
    direction = gradient / mx.linalg.norm(gradient)
    slope = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(mx.linalg.norm(gradient).item(), rel=1e-2)


def test_fresh_caches_make_no_room_for_more() -> None:
    model = tiny_model("llama")
    caches = fresh_caches(model)
    model(TOKENS, cache=caches)
    assert [cache.keys.shape for cache in caches] == [(2, 2, 12, 16)] * 3
    logits = model(TOKENS[:, :1], cache=caches)
    text = mx.concatenate([TOKENS, TOKENS[:, :1]], axis=1)
    np.testing.assert_allclose(logits[:, 0], model(text)[:, -1], atol=1e-5)


def test_networks_that_take_no_cache_are_called_without() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Embedding(8, 6)]

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.layers[0](tokens)

    assert read_whole(Bigram(), TOKENS[:, 3:4] * 0).shape == (2, 1, 6)
    assert vocab_width(Bigram()) == 6
    assert vocab_width(tiny_model("cohere")) == 97
