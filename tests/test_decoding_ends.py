"""Texts end where mlx-lm's end, wherever in a draft that is, and so do their caches."""

from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import DRAFTERS, PROMPTS, assert_equal_caches, ours, places, plain, seen, with_eos
from half_models import tiny_llama
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_distill import CacheConfig, batch_generate


@pytest.mark.parametrize("name", DRAFTERS)
def test_max_tokens_anywhere_in_a_draft(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    for max_tokens in places(name, 9):
        caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
        expected = seen(plain(pair, PROMPTS[0], max_tokens=max_tokens, prompt_cache=caches[1]))
        drafter = drafters[name][0]
        options = {"drafter": drafter, "max_tokens": max_tokens, "prompt_cache": caches[0]}
        assert seen(ours(pair, PROMPTS[0], **options)) == expected
        assert expected[-1][2] == "length"
        assert_equal_caches(*caches)


@pytest.mark.parametrize("name", DRAFTERS)
def test_eos_anywhere_in_a_draft(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    model, tokenizer = pair
    answer = [token for token, _, _ in seen(plain(pair, PROMPTS[0], max_tokens=14))]
    ends = [place for place, token in enumerate(answer) if token not in answer[:place]]
    assert len(ends) > 8
    for place in ends[:: 3 if name == "random" else 1]:
        ending = with_eos(tokenizer, {answer[place]})
        caches = make_prompt_cache(model), make_prompt_cache(model)
        expected = seen(plain((model, ending), PROMPTS[0], prompt_cache=caches[1]))
        assert len(expected) == place + 1
        assert expected[-1][2] == "stop"
        options = {"drafter": drafters[name][0], "prompt_cache": caches[0]}
        assert seen(ours((model, ending), PROMPTS[0], **options)) == expected
        assert_equal_caches(*caches)


def test_eos_as_the_last_allowed_token(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    answer = [token for token, _, _ in seen(plain(pair, PROMPTS[0], max_tokens=6))]
    ending = (pair[0], with_eos(pair[1], {answer[5]}))
    expected = seen(plain(ending, PROMPTS[0], max_tokens=6))
    for name in DRAFTERS:
        found = seen(ours(ending, PROMPTS[0], drafter=drafters[name][0], max_tokens=6))
        assert found == expected
        assert found[-1][2] == "stop"


@pytest.mark.parametrize("name", ["none", *DRAFTERS])
def test_stop_text_anywhere_in_a_draft(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    """Parts of tokens, whole tokens, and texts that span several of them."""
    answer = seen(plain(pair, PROMPTS[0], max_tokens=30))
    text = "".join(piece for _, piece, _ in answer)
    drafter = None if name == "none" else drafters[name][0]
    for begin, end in [(0, 1), (3, 4), (2, 9), (5, 25), (11, 13), (20, 41), (31, 33)]:
        stop = text[begin:end]
        place = text.find(stop)
        pieces = np.cumsum([len(piece) for _, piece, _ in answer])
        num_tokens = int(np.searchsorted(pieces, place + len(stop))) + 1
        caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
        list(plain(pair, PROMPTS[0], max_tokens=num_tokens, prompt_cache=caches[1]))
        options = {"drafter": drafter, "prompt_cache": caches[0], "stop": [stop, "never met"]}
        found = seen(ours(pair, PROMPTS[0], max_tokens=100, **options))
        assert [token for token, _, _ in found] == [token for token, _, _ in answer[:num_tokens]]
        assert "".join(piece for _, piece, _ in found) == text[:place]
        assert [reason for _, _, reason in found] == [None] * (num_tokens - 1) + ["stop"]
        assert_equal_caches(*caches)


def test_stop_text_that_only_begins_is_handed_out(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    expected = seen(plain(pair, PROMPTS[0], max_tokens=20))
    text = "".join(piece for _, piece, _ in expected)
    stop = [text[-4:] + "?", text[3:9] + "?"]
    found = seen(ours(pair, PROMPTS[0], drafter=drafters["knowing"][0], max_tokens=20, stop=stop))
    assert "".join(piece for _, piece, _ in found) == text
    assert found[-1][2] == "length"


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "close") for name in ("none", *DRAFTERS)), ("hiding", "throw")]
)
def test_consumer_leaves_anywhere_in_a_cycle(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str, how: str
) -> None:
    drafter = None if name == "none" else drafters[name][0]
    for num_tokens in [0, *places(name, 8)]:
        caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
        responses = ours(pair, PROMPTS[0], drafter=drafter, prompt_cache=caches[0])
        others = plain(pair, PROMPTS[0], prompt_cache=caches[1])
        found, expected = (seen(islice(part, num_tokens)) for part in (responses, others))
        assert found == expected
        others.close()
        if how == "close":
            responses.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                responses.throw(KeyboardInterrupt())
        if num_tokens:
            assert_equal_caches(*caches)
        else:
            assert caches[0][0].empty()


@pytest.mark.parametrize("name", DRAFTERS)
def test_consumer_leaves_a_window_or_a_quantized_cache(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    layers = pair[0].layers
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 13}
    for num_tokens in places(name, 8):
        windows = [[RotatingKVCache(max_size=12, keep=4) for _ in layers] for _ in range(2)]
        growing = [[KVCache() for _ in layers] for _ in range(2)]
        for caches, extra in ((windows, {}), (growing, options)):
            other: dict[str, Any] = {"drafter": drafters[name][0], "cache": CacheConfig(**extra)}
            responses = ours(pair, PROMPTS[0], prompt_cache=caches[0], **other)
            others = plain(pair, PROMPTS[0], prompt_cache=caches[1], **extra)
            assert seen(islice(responses, num_tokens)) == seen(islice(others, num_tokens))
            responses.close()
            others.close()
            kinds = [[type(cache).__name__ for cache in part] for part in caches]
            assert kinds[0] == kinds[1], f"after {num_tokens} tokens"
            assert_equal_caches(*caches)


@pytest.mark.parametrize("texts", [1, 2])
def test_a_padded_heads_token_is_no_text(pair: tuple[Any, Any], texts: int) -> None:
    """SentencePiece has no place for it: mlx-lm ends in an IndexError, and so did a batch."""
    model = tiny_llama(head_dim=32, vocab_size=4160)
    barred = mx.arange(4160) < 4100
    each: list[dict[str, Any]] = [{} for _ in range(texts)]
    each[0]["logits_processors"] = [lambda _, logits: mx.where(barred, -mx.inf, logits)]
    prompts = [[5, 6, 7], [8, 9]][:texts]
    answers = batch_generate(model, pair[1], prompts, each=each, max_tokens=3, batch=2)
    assert [len(answer.tokens) for answer in answers] == [3] * texts
    assert min(answers[0].tokens) >= 4100
    assert answers[0].text == ""
