"""Drafters and texts for tests of decoding: what a user sees, what a cache holds.

Exactness may not depend on the drafter, so three of them draft here: one with random weights, which
is nearly always wrong; one that knows the text, so that whole paths are accepted; and one that
knows it but hides it among wrong branches, misses every fourth token, and so commits rows that do
not lie in a line.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from half_models import tiny_llama
from mlx import nn
from mlx_lm.models.cache import (
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import mlx_distill
from mlx_distill import DraftPlan, GenerationResponse
from mlx_distill.checkpoint import bundled
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import Features
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request
from mlx_distill.target.target import Target
from mlx_distill.target.window import tail, temporal

PROMPTS = (
    "Once upon a time",
    'Ben had a red kite. "Look," said Ben,',
    "The old baker forgot",
)


class KnowingDrafter:
    """Knows what the target writes greedily after one prompt.

    A hidden state says where in the text a draft begins, so nothing is read by the host.

    Args:
        model: The target.
        prompt: The prompt's tokens.
        num_tokens: How far the text is known.
        hide: False puts the known text on the most probable beam. True puts it on the least
            probable one and leaves out every fourth token.
    """

    def __init__(self, model: Any, prompt: list[int], num_tokens: int = 64, hide: bool = False):
        target = Target.of(model)
        caches = make_prompt_cache(model)
        logits, hidden = target.forward(mx.array(prompt), caches)
        tokens, states = [mx.argmax(logits[-1:], axis=-1).astype(mx.int32)], [hidden[-1]]
        for _ in range(num_tokens):
            logits, hidden = target.forward(tokens[-1], caches)
            tokens.append(mx.argmax(logits, axis=-1).astype(mx.int32))
            states.append(hidden[-1])
        self.tokens = mx.concatenate(tokens)
        self.states = mx.stack(states).astype(mx.float32)
        mx.eval(self.tokens, self.states)
        self.vocab_size = target.vocab_size
        self.hide = hide

    def hiding(self) -> "KnowingDrafter":
        """Return one that knows the same text and hides it."""
        other = copy.copy(self)
        other.hide = True
        return other

    taps = ()

    def open(self, prompt: mx.array, features: Features) -> "KnowingState":
        return KnowingState(self, features)

    def draft(self, hidden: mx.array, root: mx.array, plan: DraftPlan) -> Draft:
        width, length = plan.beam_width, plan.draft_length
        at = mx.argmin(mx.square(self.states - hidden[None]).sum(axis=-1))
        places = mx.minimum(at + mx.arange(1, length + 1), self.tokens.size - 1)
        known = self.tokens[places]
        right = width - 1 if self.hide else 0
        if self.hide:
            known = mx.where(places % 4 == 3, known + width, known)
        # Beam j differs from the known text by j - right, so siblings carry different tokens.
        tokens = ((known[:, None] + mx.arange(width) - right) % self.vocab_size).astype(mx.int32)
        depths = mx.arange(length * width) // width + 1
        scores = -depths * (0.2 + 0.1 * (mx.arange(length * width) % width))
        zero = mx.zeros((1,), mx.int32)
        return Draft(
            mx.concatenate([root, tokens.reshape(-1)]),
            mx.concatenate([zero, mx.maximum(mx.arange(length * width) + 1 - width, 0)]),
            mx.concatenate([zero, depths]),
            mx.concatenate([zero.astype(mx.float32), scores]),
            length,
        )


class KnowingState:
    """Where the text of a knowing drafter is."""

    def __init__(self, drafter: Any, features: Features):
        self.drafter = drafter
        self.hidden = features.last

    def draft(self, root: mx.array, plan: DraftPlan, noise: mx.array | None) -> Draft:
        return self.drafter.draft(self.hidden, root, plan)

    def accept(self, tokens: mx.array, features: Features) -> None:
        self.hidden = features.last

    def rewind(self, num_tokens: int) -> None: ...


def random_drafter(model: Any, draft_vocab_size: int | None = None) -> BoundDrafter:
    """Return a drafter with random weights for a model; it drafts the first tokens only."""
    target = Target.of(model)
    assert target.embed is not None
    mx.random.seed(5)
    config = RecurrentDrafterConfig(
        target.hidden_size, target.vocab_size, 64, 1, draft_vocab_size=draft_vocab_size
    )
    network = RecurrentDrafter(config)
    mx.eval(network.parameters())
    return BoundDrafter(network, target.embed, {})


@pytest.fixture(scope="session")
def pair() -> tuple[Any, Any]:
    """Return a narrow random model: its tokens and caches have to be as exact, in less time."""
    model = tiny_llama(head_dim=32)
    return model, mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


@pytest.fixture(scope="session")
def small() -> nn.Module:
    """Return a draft model for the bundled one; no test changes it."""
    return mlx_distill.load(bundled("stories-4m"))[0]


def written_together(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Return the tokens of texts that begin together."""
    numbers = [engine.submit(one) for one in requests]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.busy:
        for one in engine.step():
            found[one.request].append(one.response.token)
    return [found[number] for number in numbers]


def drafters_of(pair: tuple[Any, Any], num_tokens: int = 64) -> dict[str, list[Any]]:
    """Return drafters by name, one for each prompt."""
    model, tokenizer = pair
    knowing = [KnowingDrafter(model, tokenizer.encode(prompt), num_tokens) for prompt in PROMPTS]
    return {
        "random": [random_drafter(model, 512)] * len(PROMPTS),
        "knowing": knowing,
        "hiding": [drafter.hiding() for drafter in knowing],
    }


@pytest.fixture(scope="session")
def drafters(pair: tuple[Any, Any]) -> dict[str, list[Any]]:
    return drafters_of(pair)


@pytest.fixture(scope="session")
def real_drafters(bundled_pair: tuple[Any, Any], bundled_drafter: Any) -> dict[str, list[Any]]:
    """Return drafters of the part of the bundled model, its own among them."""
    return {**drafters_of(bundled_pair, 32), "bundled": [bundled_drafter] * len(PROMPTS)}


DRAFTERS = ("random", "knowing", "hiding")


def places(name: str, last: int) -> list[int]:
    """Return the numbers of tokens at which a text ends: every place that a cycle can end at.

    Random drafts are wrong, so that every one of their cycles is like every other.
    """
    return [1, 2, last // 2, last] if name in ("none", "random") else list(range(1, last + 1))


def seen(responses: Iterator[Any]) -> list[tuple[int, str, str | None]]:
    """Return what a user sees of every response."""
    return [(r.token, r.text, r.finish_reason) for r in responses]


def ours(pair: tuple[Any, Any], prompt: Any, **options: Any) -> Iterator[GenerationResponse]:
    return mlx_distill.stream_generate(*pair, prompt, **options)


def plain(pair: tuple[Any, Any], prompt: Any, **options: Any) -> Iterator[Any]:
    return mlx_lm.stream_generate(*pair, prompt, **options)


def with_eos(tokenizer: Any, ids: set[int]) -> Any:
    """Return a tokenizer that takes other tokens for the end of a text."""
    other = copy.copy(tokenizer)
    other.eos_token_ids = ids
    return other


def content(cache: Any) -> list[mx.array]:
    """Return what a cache holds, in the text's order; of a window, what the next token sees."""
    if isinstance(cache, RotatingKVCache):
        arrays = [temporal(cache, x) for x in (cache.keys, cache.values)]
        return [tail(x, cache.keep, cache.max_size - 1) for x in arrays]
    arrays = cache.keys_and_values()
    return [array for x in arrays for array in (x if isinstance(x, tuple | list) else [x])]


def dequantized(cache: QuantizedKVCache) -> list[mx.array]:
    options = {"group_size": cache.group_size, "bits": cache.bits}
    return [mx.dequantize(*x, **options) for x in cache.keys_and_values()]


def assert_equal_caches(found: list[Any], expected: list[Any]) -> None:
    """Compare the caches of two decodings: kinds, offsets, contents."""
    assert len(found) == len(expected)
    for cache, other in zip(found, expected, strict=True):
        assert type(cache) is type(other)
        assert cache.offset == other.offset
        if isinstance(cache, QuantizedKVCache):
            # Rounding to a few bits turns the last bit of float32 into a step now and then. A row
            # in the wrong place would differ by the spread of the values.
            for a, b in zip(dequantized(cache), dequantized(other), strict=True):
                assert a.shape == b.shape
                assert mx.abs(a - b).mean().item() < 5e-3 * mx.std(b).item()
        else:
            for a, b in zip(content(cache), content(other), strict=True):
                assert a.shape == b.shape
                np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------- tokens


NUM_TOKENS = {"random": 8, "knowing": 32, "hiding": 20}  # 8, about 7 and about 8 cycles


@pytest.fixture(scope="session")
def plain_answers(pair: tuple[Any, Any]) -> dict[int, list[list[tuple[int, str, str | None]]]]:
    """Return mlx-lm's answers to every prompt by their length."""
    return {
        length: [seen(plain(pair, prompt, max_tokens=length)) for prompt in PROMPTS]
        for length in NUM_TOKENS.values()
    }
