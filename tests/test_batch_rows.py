"""Texts that share calls are those alone, whatever their caches keep."""

import copy
import functools
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import KnowingDrafter, KnowingState, with_eos, written_together
from test_architectures import assert_same_caches
from tiny_models import tiny_model

from mlx_distill import DraftPlan
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.protocol import FixedPlanner
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request
from mlx_distill.target.layer_cache import cached_tokens
from mlx_distill.target.prompt_cache import prompt_caches

pytestmark = pytest.mark.usefixtures("not_compiled")  # so many kinds fuse a hundred

# Some windows are full before the answer, some are later, and one never.
PROMPTS = [
    [int(token) for token in np.random.default_rng(4).integers(3, 96, size)]
    for size in (5, 19, 12, 1, 19)
]
LAWS = (Sampling(), Sampling(), Sampling(1.0), Sampling(0.8, top_p=0.9), Sampling())
CASES = {
    "windows": ("mistral", CacheConfig()),
    "windows beside all keys": ("gemma3", CacheConfig()),
    "a bounded context": ("llama", CacheConfig(max_kv_size=16)),
    "states beside keys": ("qwen3_next", CacheConfig()),
    "both in one layer": ("falcon_h1", CacheConfig()),
    "packed keys": ("llama", CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=1)),
}


@functools.cache
def model_of(name: str) -> Any:
    packed = {"head_dim": 32} if name == "llama" else {}
    return tiny_model(name, **packed)


@functools.cache
def knowing_of(name: str) -> KnowingDrafter:
    return knowing(model_of(name))


def knowing(model: Any) -> KnowingDrafter:
    """Return a drafter that knows, and hides, what the model writes greedily after the prompts."""
    several = [KnowingDrafter(model, prompt, 14, hide=True) for prompt in PROMPTS]
    one = copy.copy(several[0])
    one.tokens = mx.concatenate([other.tokens for other in several])
    one.states = mx.concatenate([other.states for other in several])
    return one


def requests(cache: CacheConfig, model: Any, count: int) -> list[Request]:
    """Return texts with laws, lengths, trees and prompt caches of their own."""
    return [
        Request(
            mx.array(prompt),
            max_tokens=4 + 2 * place,
            sampling=LAWS[place],
            seed=place,
            prompt_cache=prompt_caches(model, cache.max_kv_size),
            planner=FixedPlanner(DraftPlan(3, 4, 8 - 3 * (place % 3))),
            cache=cache,
        )
        for place, prompt in enumerate(PROMPTS[:count])
    ]


@pytest.mark.parametrize("case", CASES)
def test_texts_and_caches_are_those_alone(
    pair: tuple[Any, Any], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, cache = CASES[case]
    model, tokenizer = model_of(name), with_eos(pair[1], set())
    alone = requests(cache, model, 5)
    expected = [written_together(Engine(model, tokenizer), [one])[0] for one in alone]
    drafter = knowing_of(name)
    for drafts, count in ((drafter, 1), (drafter, 2), (drafter, 5), (None, 5)):
        together = requests(cache, model, count)
        assert (
            written_together(Engine(model, tokenizer, drafts, batch=5), together)
            == expected[:count]
        )
        for one, other in zip(together, alone, strict=False):
            assert_same_caches(one.prompt_cache or [], other.prompt_cache or [])
    assert not capsys.readouterr().err


def test_a_window_gets_room_for_larger_trees(pair: tuple[Any, Any]) -> None:
    """Of another text, and in the middle of a text."""
    model, tokenizer = model_of("mistral"), with_eos(pair[1], set())
    plans = DraftPlan(3, 3, 6), DraftPlan(6, 4, 20), DraftPlan(9, 5, 40), DraftPlan(2, 2, 4)
    shapes = iter(plans)

    class Growing:
        def shape(self, text: int, outcome: object) -> DraftPlan:
            return next(shapes, DraftPlan(3, 3, 6))

    drafter = knowing_of("mistral")
    alone = requests(CacheConfig(), model, 2)
    expected = [written_together(Engine(model, tokenizer), [one])[0] for one in alone]
    texts = requests(CacheConfig(), model, 2)
    texts[1] = replace(texts[1], planner=Growing())
    assert written_together(Engine(model, tokenizer, drafter, batch=2), texts) == expected


@pytest.mark.parametrize("case", ["windows", "packed keys", "both in one layer"])
def test_in_half_precision(pair: tuple[Any, Any], case: str) -> None:
    """Each token is a likeliest one of the model's own word on its text, as far as that rounds."""
    name, cache = CASES[case]
    model = copy.deepcopy(model_of(name))
    model.set_dtype(mx.bfloat16)
    texts = [replace(one, sampling=Sampling()) for one in requests(cache, model, 5)]
    engine = Engine(model, with_eos(pair[1], set()), knowing(model), batch=5)
    for one, tokens in zip(texts, written_together(engine, texts), strict=True):
        text = mx.concatenate([one.prompt, mx.array(tokens)])
        said = model(text[None])[0, one.prompt.size - 1 : -1].astype(mx.float32)
        short = said.max(axis=-1) - said[mx.arange(len(tokens)), mx.array(tokens)]
        assert short.max().item() < 0.02 * (said.max() - said.min()).item()


class Interrupting:
    """Ctrl-C while the so-many-th draft is planned."""

    def __init__(self, calls: int):
        self.calls = calls

    def shape(self, text: int, outcome: object) -> DraftPlan:
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return DraftPlan(3, 4, 8)


@pytest.mark.parametrize("name", ["mistral", "qwen3_next"])
def test_what_ends_early_leaves_what_was_handed_out(pair: tuple[Any, Any], name: str) -> None:
    """A text is cancelled while a call is on its way, and an interrupt ends the other."""
    model, tokenizer = model_of(name), with_eos(pair[1], set())
    drafter = knowing_of(name).hiding()
    for calls, cancelled in ((4, 2), (7, 5)):
        planner = Interrupting(calls)
        texts = [replace(one, planner=planner) for one in requests(CacheConfig(), model, 2)]
        texts = [replace(one, sampling=Sampling(), max_tokens=20) for one in texts]
        engine = Engine(model, tokenizer, drafter, batch=2)
        numbers = [engine.submit(one) for one in texts]
        found: dict[int, list[int]] = {number: [] for number in numbers}

        def go_on(
            engine: Engine = engine,
            found: dict[int, list[int]] = found,
            first: int = numbers[0],
            most: int = cancelled,
        ) -> None:
            while engine.busy:
                for one in engine.step():
                    found[one.request].append(one.response.token)
                if len(found[first]) >= most:
                    engine.cancel(first)

        with pytest.raises(KeyboardInterrupt):
            go_on()
        for text, tokens in zip(texts, found.values(), strict=True):
            fresh = prompt_caches(model)
            for token in [*text.prompt.tolist(), *tokens]:
                model(mx.array([[token]]), cache=fresh)
            assert_same_caches(text.prompt_cache or [], fresh)


def test_a_draft_that_does_not_end_well_leaves_every_text_what_it_was_handed_out(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(state: KnowingState) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(KnowingState, "close", close, raising=False)
    model, tokenizer = model_of("mistral"), with_eos(pair[1], set())
    texts = [replace(one, max_tokens=20) for one in requests(CacheConfig(), model, 3)]
    engine = Engine(model, tokenizer, knowing(model), batch=2)
    found: dict[int, list[int]] = {engine.submit(one): [] for one in texts}
    for _ in range(3):
        for one in engine.step():
            found[one.request].append(one.response.token)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert not engine.busy
    assert list(map(bool, found.values())) == [True, True, False]
    for text, tokens in zip(texts, found.values(), strict=True):
        if not tokens:  # the third one waits
            assert cached_tokens(text.prompt_cache or []) == 0
            continue
        fresh = prompt_caches(model)
        model(mx.array([[*text.prompt.tolist(), *tokens]]), cache=fresh)
        assert_same_caches(text.prompt_cache or [], fresh)
