"""Prompt caches of a bounded length, in models that make their own caches, too."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import REPOSITORY
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from tiny_models import tiny_model

from mlx_distill import load, stream_generate
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.target.layer_cache import leaves
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target

TEXT = [int(token) for token in np.random.default_rng(1).integers(1, 96, 34)]


def by_hand(model: Any, size: int) -> list[RotatingKVCache]:
    """Return what mlx-lm gives to models that make no caches of their own."""
    return [RotatingKVCache(max_size=size, keep=4) for _ in model.layers]


def test_without_a_bound_they_are_those_of_mlx_lm() -> None:
    model = tiny_model("gemma3_text")
    expected = make_prompt_cache(model)
    assert [type(c) for c in prompt_caches(model)] == [type(c) for c in expected]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_full_attention_rotates_as_in_mlx_lm(name: str) -> None:
    model = tiny_model(name)
    caches, expected = prompt_caches(model, 16), by_hand(model, 16)
    for tokens in (TEXT[:20], *([token] for token in TEXT[20:])):
        found = model(mx.array([tokens]), cache=caches)
        np.testing.assert_array_equal(found, model(mx.array([tokens]), cache=expected))
    assert all(cache.keys.shape[2] == 16 for cache in caches)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize(
    "name", ["llama", "llama-sliding", "gemma3n", "longcat_flash", "falcon_h1", "llama4", "gpt_oss"]
)
def test_no_layer_grows_with_the_text(name: str) -> None:
    model = tiny_model(name)
    caches, whole = prompt_caches(model, 16), make_prompt_cache(model)
    assert not [part for part in leaves(caches) if type(part) is KVCache]
    for place, token in enumerate(TEXT):
        found, expected = (model(mx.array([[token]]), cache=c)[0, -1] for c in (caches, whole))
        if place < 16:  # until then there is nothing to forget
            np.testing.assert_allclose(found, expected, atol=1e-3)
    rings = [part for part in leaves(caches) if isinstance(part, RotatingKVCache)]
    assert max(part.keys.shape[2] for part in rings) <= 16


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("name", ["llama", "gemma3n", "longcat_flash", "qwen2_moe"])
def test_trees_see_what_plain_decoding_remembers(name: str) -> None:
    model = tiny_model(name)
    target = Target.of(model)
    caches, plain = prompt_caches(model, 16), prompt_caches(model, 16)
    for one in (caches, plain):
        target.forward(mx.array(TEXT[:24]), one)
    call = target.verify(PrefixTree.from_beams([[1, 2, 3], [1, 4, 5]]), caches)
    call.commit([0, 3, 4])
    for node, token in ((0, 1), (3, 4), (4, 5)):
        expected, _ = target.forward(mx.array([token]), plain)
        np.testing.assert_allclose(call.logits[node], expected[0], atol=5e-3)
    found, expected = (target.forward(mx.array([7]), one)[0] for one in (caches, plain))
    np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("deepseek_v32", "KVCache"), ("deepseek_v41", "Layer")),
        # In a full ring they would take slots for positions: the last block, or where a query is.
        *(("minimax_m3_vl", "KVCache"), ("afm7", "KVCache")),
    ],
)
def test_a_cache_that_cannot_be_bounded_is_said_so(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"max_kv_size cannot bound this model's cache .{kind}"):
        prompt_caches(tiny_model(name), 16)


def test_a_bound_below_what_stays() -> None:
    with pytest.raises(InputError, match="max_kv_size must be above 4, got 4"):
        prompt_caches(tiny_model("llama"), 4)


def test_generate_forgets_as_mlx_lm_does() -> None:
    model, tokenizer = load(str(REPOSITORY / "models" / "stories-4m"))
    prompt = tokenizer.encode("Once upon a time there was a little dog who liked to")
    steps = generate_step(mx.array(prompt), model, max_tokens=40, prompt_cache=by_hand(model, 16))
    expected = [int(token) for token, _ in steps]
    responses = stream_generate(
        model, tokenizer, prompt, max_tokens=40, cache=CacheConfig(max_kv_size=16)
    )
    found = [response.token for response in responses]
    assert found == expected[: len(found)]
    assert len(found) > 20
