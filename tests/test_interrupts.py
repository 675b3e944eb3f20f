"""Ctrl-C at any moment: the prompt cache holds the prompt and what was handed out, or says so."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import KnowingDrafter, assert_equal_caches, with_eos
from half_models import tiny_llama
from interrupting import interrupted
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.speculation.ledger import Unusable
from mlx_distill.target.restoring import even_out
from mlx_distill.target.window import AsSteps

PROMPT = [5, 17, 42, 8, 23, 61, 9]
MAX_TOKENS = 14
MOMENTS = 60
QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}
KINDS = ("growing", "window", "quantised", "processors", "hiding", "plain")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    tokenizer = mlx_lm.utils.load_tokenizer(bundled("stories-14m"))
    return tiny_llama(head_dim=32), with_eos(tokenizer, set())


@pytest.fixture(scope="module")
def answer(pair: tuple[Any, Any]) -> list[int]:
    return plain_answer(pair, None)


def plain_answer(pair: tuple[Any, Any], caches: list[Any] | None) -> list[int]:
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS + 2, "prompt_cache": caches}
    return [r.token for r in mlx_distill.stream_generate(*pair, PROMPT, **options)]


def new_caches(kind: str, model: Any) -> list[Any]:
    if kind == "window":
        return [RotatingKVCache(max_size=12, keep=4) for _ in model.layers]
    return make_prompt_cache(model)


def caches_by_length(kind: str, model: Any, text: list[int]) -> dict[int, list[Any]]:
    """Return what plain decoding's caches hold of a text, by the number of its tokens."""
    caches, found = new_caches(kind, model), {}
    mx.eval(model(mx.array([PROMPT]), cache=caches))
    for number in range(len(PROMPT), len(text)):
        if kind == "quantised":
            CacheConfig(**QUANTISED).quantize(caches)
        found[number] = copy.deepcopy(caches)
        mx.eval(model(mx.array([text[number : number + 1]]), cache=caches))
    return found


def responses(kind: str, pair: tuple[Any, Any], caches: list[Any], drafter: Any) -> Iterator[Any]:
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "prompt_cache": caches}
    options["drafter"] = None if kind == "plain" else drafter
    if kind == "quantised":
        options["cache"] = CacheConfig(**QUANTISED)
    if kind == "processors":
        options["logits_processors"] = [lambda tokens, logits: logits]
    return mlx_distill.stream_generate(*pair, PROMPT, **options)


def written(make: Callable[[], Iterator[Any]], moment: int | None) -> tuple[list[int], int]:
    """Return the tokens that came before the interrupt, and how many moments there were."""
    found: list[int] = []

    def write(stream: Iterator[Any]) -> None:
        for response in stream:
            found.append(response.token)

    return found, interrupted(write, moment, make())


# Where an iterator is being thrown away, Python reports the interrupt and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_what_was_handed_out(
    pair: tuple[Any, Any], answer: list[int], kind: str
) -> None:
    model = pair[0]
    if kind == "window":
        answer = plain_answer(pair, new_caches(kind, model))
    expected = caches_by_length(kind, model, PROMPT + answer)
    drafter = KnowingDrafter(model, PROMPT, 20, hide=kind == "hiding")
    run = lambda caches: lambda: responses(kind, pair, caches, drafter)  # noqa: E731
    written(run(new_caches(kind, model)), None)  # what is compiled is compiled
    _, total = written(run(new_caches(kind, model)), None)
    places = set()
    for moment in np.linspace(1, total, MOMENTS).astype(int).tolist():
        caches = new_caches(kind, model)
        found, _ = written(run(caches), moment)
        assert found == answer[: len(found)]
        if kind == "window" and isinstance(caches[0], Unusable):
            continue  # in the instant in which the window's arrays are written
        held = {cache.offset for cache in caches}
        assert len(held) == 1, f"layers disagree after moment {moment} of {total}"
        (num_tokens,) = held
        # At most the token that was on its way to the caller is in the cache already.
        allowed = {len(PROMPT) + len(found), len(PROMPT) + min(len(found) + 1, MAX_TOKENS)}
        assert num_tokens in allowed | ({0} if not found else set()), f"moment {moment} of {total}"
        places.add(len(found))
        if num_tokens:
            assert_equal_caches(caches, expected[num_tokens])
    # Most moments lie within a cycle, of which an answer has four.
    assert len(places) > 4, "the moments do not reach into the answer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("place", range(1, 8))
def test_a_logits_processor_that_fails(
    pair: tuple[Any, Any], answer: list[int], place: int, error: type[BaseException]
) -> None:
    """Where several tokens of a draft may be accepted already, and none was handed out."""
    calls = []

    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append(tokens.size)
        if len(calls) == place:
            raise error("stop")
        return logits

    caches = make_prompt_cache(pair[0])
    drafter = KnowingDrafter(pair[0], PROMPT, 20)
    options: dict[str, Any] = {"drafter": drafter, "logits_processors": [fail]}
    stream = mlx_distill.stream_generate(*pair, PROMPT, prompt_cache=caches, **options)
    found = []
    with pytest.raises(error):
        found += (response.token for response in stream)
    assert {cache.offset for cache in caches} == {len(PROMPT) + len(found)}
    rest = mlx_distill.stream_generate(
        *pair, answer[len(found) : len(found) + 1], prompt_cache=caches, max_tokens=3
    )
    assert [r.token for r in rest] == answer[len(found) + 1 : len(found) + 4]


def test_a_layer_with_keys_and_a_state_of_different_tokens_says_so(pair: tuple[Any, Any]) -> None:
    """All keys are of the text's length; one state has read a token more."""
    model = tiny_model("falcon_h1")
    caches = make_prompt_cache(model)
    attention, calls = model.layers[0].self_attn, []

    def fail(*args: object, **kwargs: object) -> mx.array:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attention(*args, **kwargs)

    model.layers[0].self_attn = fail
    with pytest.raises(KeyboardInterrupt):
        list(mlx_distill.stream_generate(model, pair[1], PROMPT, prompt_cache=caches))
    with pytest.raises(InputError, match="the prompt cache cannot be used any more"):
        list(mlx_distill.stream_generate(model, pair[1], PROMPT, prompt_cache=caches))


def test_a_state_that_cannot_be_taken_back_says_so(pair: tuple[Any, Any]) -> None:
    """A recurrent cache does not know how far it is."""
    model = tiny_model("mamba")
    caches = make_prompt_cache(model)
    calls = []

    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append(tokens.size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    options: dict[str, Any] = {"prompt_cache": caches, "logits_processors": [fail]}
    with pytest.raises(KeyboardInterrupt):
        list(mlx_distill.stream_generate(model, pair[1], PROMPT, **options))
    for use in (
        lambda: mlx_distill.stream_generate(model, pair[1], PROMPT, prompt_cache=caches),
        lambda: caches[0].offset,
    ):
        with pytest.raises(InputError, match="the prompt cache cannot be used any more"):
            use()


@pytest.mark.parametrize("kind", ["growing", "window"])
@pytest.mark.parametrize("num_tokens", range(8, 12))
def test_an_interrupt_while_the_cache_is_settled_is_raised_afterwards(
    pair: tuple[Any, Any], kind: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is full lets a token go for one that is read; it may be read again."""
    caches = new_caches(kind, pair[0])
    stream = responses(kind, pair, caches, KnowingDrafter(pair[0], PROMPT, 20))
    found = [next(stream).token for _ in range(num_tokens)]
    interrupts = [KeyboardInterrupt, KeyboardInterrupt]
    evaluate = mx.eval

    def interrupt(*arrays: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    assert not interrupts
    monkeypatch.undo()
    expected = caches_by_length(kind, pair[0], [*PROMPT, *found, 0])[len(PROMPT) + num_tokens]
    assert {cache.offset for cache in caches} == {len(PROMPT) + num_tokens}
    assert_equal_caches(caches, expected)


@pytest.mark.parametrize("make", [KVCache, lambda: ChunkedKVCache(1024)])
def test_keys_that_have_grown_without_values_are_cut(make: Callable[[], Any]) -> None:
    cache, rows = make(), mx.ones((1, 1, 254, 2))
    cache.update_and_fetch(rows[..., :5, :], rows[..., :5, :])
    cache.keys = mx.concatenate([cache.keys, cache.keys], axis=2)
    even_out(cache)
    keys, values = cache.update_and_fetch(rows, rows)
    assert keys.shape == values.shape == (1, 1, 259, 2)
    assert mx.array_equal(keys, values)


def test_a_window_that_was_left_as_steps_is_one_again() -> None:
    window = RotatingKVCache(max_size=12, keep=4)
    window.__class__ = AsSteps
    even_out(window)
    assert type(window) is RotatingKVCache
