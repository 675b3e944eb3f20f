"""Decoding with a drafter leaves every kind of cache as mlx-lm's own loop does."""

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import (
    DRAFTERS,
    PROMPTS,
    KnowingDrafter,
    assert_equal_caches,
    ours,
    plain,
    random_drafter,
    seen,
    with_eos,
)
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)
from tiny_models import tiny_model

from mlx_distill import CacheConfig, DraftPlan

# ------------------------------------------------------------------------- kinds of caches


def first_difference(found: list[Any], expected: list[Any]) -> tuple[int, float] | None:
    """Return the first token that differs, and by how much mlx-lm's best was above the second."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.token != other.token:
            best = mx.sort(other.logprobs.astype(mx.float32))[-2:]
            return index, (best[1] - best[0]).item()
    return None


@pytest.mark.parametrize(("bits", "margin"), [(8, 5e-3), (4, 5e-2)])
@pytest.mark.parametrize("start", [0, 18])
def test_quantized_cache(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], start: int, bits: int, margin: float
) -> None:
    """A start of 18 is crossed in the answer: the prompts are shorter.

    The rows of a call with several tokens differ in float32's last bits, and rounding to a few bits
    makes steps of some of them: where the best two tokens are that near, they may change places.
    """
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}
    number = int(start == 0)
    for prompt in PROMPTS[number : number + 1]:
        theirs = make_prompt_cache(pair[0])
        expected = list(plain(pair, prompt, max_tokens=20, prompt_cache=theirs, **options))
        for name in DRAFTERS:
            caches = make_prompt_cache(pair[0])
            found = list(
                ours(
                    pair,
                    prompt,
                    drafter=drafters[name][number],
                    cache=CacheConfig(**options),
                    max_tokens=20,
                    prompt_cache=caches,
                    plan=DraftPlan(3, 5, 12),
                )
            )
            assert all(isinstance(cache, QuantizedKVCache) for cache in caches)
            different = first_difference(found, expected)
            if different is None:
                assert_equal_caches(caches, theirs)
            else:
                assert different[1] < margin, (name, different)


def test_quantization_starts_where_plain_decoding_starts_it(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    """Before, at and after the border the cache is of the kind that mlx-lm's is."""
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}
    for name in ("knowing", "hiding"):
        for max_tokens in range(5, 12):
            caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
            limit: dict[str, Any] = {"max_tokens": max_tokens}
            expected = plain(pair, PROMPTS[0], prompt_cache=caches[1], **options, **limit)
            limit |= {"drafter": drafters[name][0], "cache": CacheConfig(**options)}
            found = ours(pair, PROMPTS[0], prompt_cache=caches[0], **limit)
            assert seen(found) == seen(expected)
            kinds = [[type(cache).__name__ for cache in part] for part in caches]
            assert kinds[0] == kinds[1], f"after {max_tokens} tokens"
            assert_equal_caches(*caches)


@pytest.mark.parametrize(("size", "keep"), [(16, 4), (16, 0), (9, 4)])
def test_window_that_wraps(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], size: int, keep: int
) -> None:
    """The answer is several windows long, some prompts are longer than one.

    The draft is longer than the smallest window, beside the tokens that stay.
    """
    plan = DraftPlan(3, 7, 15)

    def new_caches() -> list[Any]:
        return [RotatingKVCache(max_size=size, keep=keep) for _ in pair[0].layers]

    for number, prompt in enumerate(PROMPTS[:2]):
        theirs = new_caches()
        expected = seen(plain(pair, prompt, max_tokens=24, prompt_cache=theirs))
        for name in DRAFTERS:
            options: dict[str, Any] = {"drafter": drafters[name][number], "plan": plan}
            caches = new_caches()
            found = ours(pair, prompt, max_tokens=24, prompt_cache=caches, **options)
            assert seen(found) == expected, name
            assert_equal_caches(caches, theirs)


def test_max_kv_size_equals_mlx_lm(pair: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model("qwen2"), with_eos(pair[1], set())
    prompt = [int(t) for t in np.random.default_rng(4).integers(3, 96, 20)]
    expected = seen(plain((model, tokenizer), prompt, max_tokens=24, max_kv_size=16))
    unlimited = seen(plain((model, tokenizer), prompt, max_tokens=24))
    assert expected != unlimited  # the window does cut
    for drafter in (None, random_drafter(model), KnowingDrafter(model, prompt, hide=True)):
        options: dict[str, Any] = {"drafter": drafter, "cache": CacheConfig(max_kv_size=16)}
        assert seen(ours((model, tokenizer), prompt, max_tokens=24, **options)) == expected


def test_prompt_is_read_in_chunks(pair: tuple[Any, Any], drafters: dict[str, list[Any]]) -> None:
    prompt = pair[1].encode(PROMPTS[1])
    for size in (1, 4, len(prompt) - 1, len(prompt)):
        caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
        options: dict[str, Any] = {"max_tokens": 12, "prompt_cache": caches[1]}
        expected = seen(plain(pair, prompt, prefill_step_size=size, **options))
        options |= {"prompt_cache": caches[0], "drafter": drafters["knowing"][1]}
        found = seen(ours(pair, prompt, cache=CacheConfig(prefill_step_size=size), **options))
        assert found == expected
        assert_equal_caches(*caches)


# --------------------------------------------------------------------------------- prompt caches


@pytest.mark.parametrize("window", [False, True])
def test_two_turns_equal_one_plain_run(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], window: bool
) -> None:
    """The second turn starts from the cache that a drafted first turn left behind."""
    model, tokenizer = pair
    second = tokenizer.encode(" Then a big dog came and", add_special_tokens=False)
    first = tokenizer.encode(PROMPTS[0])
    empty = lambda: [RotatingKVCache(16, 4) if window else KVCache() for _ in model.layers]  # noqa: E731
    for num_tokens in (1, 4, 7):
        theirs = empty()
        turn = [r.token for r in plain(pair, first, max_tokens=num_tokens, prompt_cache=theirs)]
        expected = seen(plain(pair, second, max_tokens=12, prompt_cache=theirs))
        if not window:
            assert expected == seen(plain(pair, first + turn + second, max_tokens=12))
        for name in DRAFTERS:
            caches = empty()
            kept: dict[str, Any] = {"drafter": drafters[name][0], "prompt_cache": caches}
            assert [r.token for r in ours(pair, first, max_tokens=num_tokens, **kept)] == turn
            assert seen(ours(pair, second, max_tokens=12, **kept)) == expected
            assert_equal_caches(caches, theirs)


def next_logits(model: Any, caches: list[Any], text: list[int]) -> mx.array:
    logits = model(mx.array([text]), cache=caches)[0]
    mx.eval(logits)
    return logits


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("plan", [DraftPlan(1, 5, 6), DraftPlan(2, 5, 9)])
def test_chunks_are_whole_wherever_a_text_is_left(pair: tuple[Any, Any], plan: DraftPlan) -> None:
    """Tokens 16 to 18 open a chunk; the call behind them drops what the one before has of 8 to 10.

    A caller who leaves within the cycle goes on in the chunk before.
    """
    model, tokenizer = tiny_model("llama4"), with_eos(pair[1], set())
    prompt = [int(t) for t in np.random.default_rng(7).integers(3, 96, 13)]
    drafter = KnowingDrafter(model, prompt, 12, hide=plan.beam_width > 1)
    for number in range(1, 7):
        caches = make_prompt_cache(model)
        options: dict[str, Any] = {"prompt_cache": caches, "drafter": drafter, "plan": plan}
        responses = ours((model, tokenizer), prompt, max_tokens=12, **options)
        tokens = [next(responses).token for _ in range(number)]
        responses.close()
        whole = make_prompt_cache(model)
        next_logits(model, whole, prompt + tokens)
        found, expected = (next_logits(model, each, [5, 6]) for each in (caches, whole))
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=str(number))


@pytest.mark.usefixtures("not_compiled")
def test_chunks_of_a_draft_model_are_whole_wherever_a_text_is_left(pair: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model("llama4"), with_eos(pair[1], set())
    small, prompt = tiny_model("llama4", seed=1), list(range(20, 32))
    for number in range(1, 7):
        caches = make_prompt_cache(model)
        options: dict[str, Any] = {"prompt_cache": caches, "draft_model": small}
        responses = ours((model, tokenizer), prompt, num_draft_tokens=6, **options)
        tokens = [next(responses).token for _ in range(number)]
        responses.close()
        for one, part in ((model, caches[:4]), (small, caches[4:])):
            whole = make_prompt_cache(one)
            next_logits(one, whole, prompt + tokens)
            if part:  # nothing was drafted behind the first token
                found, expected = (next_logits(one, each, [5, 6]) for each in (part, whole))
                np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=str(number))


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("drafted", [False, True])
def test_chunks_that_a_prompt_dropped_come_back(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, drafted: bool
) -> None:
    """Ctrl-C in a prompt of several chunks leaves what the cache held before it."""
    model, tokenizer = tiny_model("llama4"), with_eos(pair[1], set())
    caches, calls = make_prompt_cache(model), [0]
    first = next_logits(model, caches, list(range(5, 15)))
    drafter, kind = random_drafter(model) if drafted else None, type(model)
    plainly = kind.__call__

    def until_the_sixth(self: Any, *args: Any, **options: Any) -> mx.array:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return plainly(self, *args, **options)

    monkeypatch.setattr(kind, "__call__", until_the_sixth)
    options: dict[str, Any] = {"drafter": drafter, "cache": CacheConfig(prefill_step_size=4)}
    with pytest.raises(KeyboardInterrupt):
        list(ours((model, tokenizer), list(range(20, 50)), prompt_cache=caches, **options))
    monkeypatch.undo()
    whole = make_prompt_cache(model)
    np.testing.assert_allclose(next_logits(model, whole, list(range(5, 15))), first, atol=1e-3)
    found, expected = (next_logits(model, each, [5, 6]) for each in (caches, whole))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_cache_can_be_trimmed_afterwards(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    cache = make_prompt_cache(pair[0])
    options = {"drafter": drafters["hiding"][0], "prompt_cache": cache}
    answer = [r.token for r in ours(pair, PROMPTS[0], max_tokens=20, **options)]
    assert can_trim_prompt_cache(cache)
    mlx_lm.models.cache.trim_prompt_cache(cache, 8)
    again = [r.token for r in ours(pair, answer[12:13], max_tokens=7, **options)]
    assert again == answer[13:20]
