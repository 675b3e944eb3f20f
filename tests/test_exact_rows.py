"""Exact rows: a drafted text is the plainly decoded one in every precision, to the last bit."""

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from half_models import tiny_llama
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill import CacheConfig, batch_generate, stream_generate
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling, sample
from mlx_distill.kernels.product_source import MOST_ROWS, Packed
from mlx_distill.kernels.products import one_by_one
from mlx_distill.target.exact import ExactTarget

PROMPT = [5, 9, 33, 2, 7, 11, 5]
TREE = PrefixTree.from_beams([[1, 2, 3, 9], [1, 4, 5], [1, 2, 7, 8], [1, 6]])
TYPES = (mx.float32, mx.float16, mx.bfloat16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_product_has_the_bits_of_the_row_alone(dtype: mx.Dtype, bits: int | None) -> None:
    mx.random.seed(0)
    x = mx.random.normal((MOST_ROWS, 192)).astype(dtype)
    weight, bias = mx.random.normal((96, 192)).astype(dtype), mx.random.normal((96,)).astype(dtype)
    packed = None
    if bits:
        weight, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
        packed = Packed(scales, biases, 64, bits, "affine")
    for rows in (2, 7, MOST_ROWS):
        found = one_by_one(x[:rows], weight, bias, packed)
        for row in range(rows):
            alone = one_by_one(x[row : row + 1], weight, bias, packed)
            np.testing.assert_array_equal(
                mx.view(found[row], mx.uint8), mx.view(alone[0], mx.uint8)
            )


def test_a_linear_layer_alone_has_those_bits() -> None:
    mx.random.seed(0)
    layer, x = nn.Linear(192, 96), mx.random.normal((9, 192))
    found = one_by_one(x, layer.weight, layer.bias, None)
    rows = mx.concatenate([layer(x[row : row + 1][None])[0] for row in range(9)])
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "together"),
    [("llama", True), ("gemma3_text", False), ("qwen3_next", False)],
)
def test_nodes_and_what_follows_them_have_the_bits_of_steps(
    kind: str, together: bool, dtype: mx.Dtype
) -> None:
    if kind == "qwen3_next" and dtype != mx.float32:
        pytest.skip("MLX's products of experts are float32 off a GPU")
    model = tiny_model(kind)
    model.set_dtype(dtype)
    target = ExactTarget(model)
    assert target.together == together
    path = TREE.paths()[5]
    caches, others = _read(model), _read(model)
    call = target.verify(TREE, caches)
    call.commit(path)
    for node in path:
        step = model(TREE.tokens[node : node + 1][None], cache=others)[0]
        np.testing.assert_array_equal(
            call.logits[node].astype(mx.float32), step[0].astype(mx.float32)
        )
    found, expected = (model(mx.array([[4]]), cache=c).astype(mx.float32) for c in (caches, others))
    np.testing.assert_array_equal(found, expected)


def test_a_committed_path_is_taken_back() -> None:
    model = tiny_model("gemma3_text")
    caches = _read(model)
    call, paths = ExactTarget(model).verify(TREE, caches), TREE.paths()
    for path in (paths[3], paths[4], paths[6]):
        call.rewind(0)
        call.commit(path)
        call.rewind(2)
        others = _read(model)
        for token in [*(TREE.tokens[node].item() for node in path[:2]), 4]:
            expected = model(mx.array([[token]]), cache=others)
        np.testing.assert_array_equal(model(mx.array([[4]]), cache=caches), expected)


@pytest.mark.parametrize(
    ("dtype", "bits", "kv_bits"),
    [(mx.float16, None, 8), (mx.bfloat16, None, None), (mx.bfloat16, 4, 8), (mx.float32, 8, 4)],
    ids=str,
)
def test_texts_in_reduced_precision_are_those_of_mlx_lm(
    bundled_pair: tuple[Any, Any], dtype: mx.Dtype, bits: int | None, kv_bits: int | None
) -> None:
    tokenizer = bundled_pair[1]
    model = tiny_llama(hidden_size=128, vocab_size=512)  # heads of 32, a group of the cache
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    cache: dict[str, Any] = {"kv_bits": kv_bits, "kv_group_size": 32, "quantized_kv_start": 0}
    cache = cache if kv_bits else {}
    theirs = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=24, **cache)
    expected = [one.token for one in theirs]
    options: dict[str, Any] = {"max_tokens": 24, "cache": CacheConfig(**cache), "exact_rows": True}
    found = list(stream_generate(model, tokenizer, PROMPT, draft_model=model, **options))
    assert [one.token for one in found] == expected
    assert found[-1].tokens_per_call > 1.3  # some of it was drafted


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_drawn_from_what_was_rounded_once(dtype: mx.Dtype, temperature: float) -> None:
    """Twice, what mlx-lm tells apart may be equal, and another token the best."""
    model = tiny_model("llama")
    model.set_dtype(dtype)
    sampling, noise = Sampling(temperature), None
    logits = mx.random.normal((4000, 97), key=mx.random.key(1)).astype(dtype)
    if temperature:
        noise = mx.random.gumbel(logits.shape, key=mx.random.key(2))
    found = sample(ExactTarget(model).as_drawn(logits), sampling, noise)
    theirs = [row - mx.logsumexp(row, keepdims=True) for row in mx.split(logits, len(logits))]
    expected = sample(mx.concatenate(theirs).astype(mx.float32), sampling, noise)
    np.testing.assert_array_equal(found, expected)


def _read(model: nn.Module) -> list[Any]:
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([PROMPT]), cache=caches))
    return caches


def test_several_exact_texts_take_turns(
    bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, prompts = bundled_pair[1], [PROMPT, PROMPT[:3]]
    model = tiny_llama(hidden_size=128, vocab_size=512)
    model.set_dtype(mx.float16)
    options: dict[str, Any] = {"draft_model": model, "exact_rows": True, "max_tokens": 8}
    found = batch_generate(model, tokenizer, prompts, batch=2, **options)
    for answer, prompt in zip(found, prompts, strict=True):
        theirs = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=8)
        assert answer.tokens == [one.token for one in theirs]
    assert "one by one: exact rows" in capsys.readouterr().err
