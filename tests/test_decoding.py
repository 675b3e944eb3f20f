"""Decoding with a drafter against mlx-lm's own loop: tokens, texts, caches, whatever the drafter.

Exactness may not depend on the drafter, so three of them draft here: one with random weights, which
is nearly always wrong; one that knows the text, so that whole paths are accepted; and one that
knows it but hides it among wrong branches, misses every fourth token, and so commits rows that do
not lie in a line.
"""

import copy
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from half_models import tiny_llama
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, DraftPlan, GenerationResponse
from mlx_distill.checkpoint import bundled
from mlx_distill.core import filters
from mlx_distill.core.draft import Draft
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters import bound
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import Features, FixedPlanner
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.speculation import cycle as cycle_module
from mlx_distill.speculation import decoding as decoding_module
from mlx_distill.speculation.cycle import Decoding
from mlx_distill.speculation.decoding import decode
from mlx_distill.target.target import Target
from mlx_distill.target.window import tail, temporal

PROMPTS = (
    "Once upon a time",
    'Ben had a red kite. "Look," said Ben,',
    "The old baker forgot",
)
# Widths, lengths, node budgets and both kinds of trees; the last are larger than what is drafted.
PLANS = (
    DraftPlan(1, 1, 2),
    DraftPlan(2, 3, 5),
    DraftPlan(4, 5, 1),
    DraftPlan(4, 5, 8),
    DraftPlan(3, 7, 100),
    DraftPlan(1, 4, tree="beam"),
    DraftPlan(4, 5, tree="beam"),
    DraftPlan(8, 2, tree="beam"),
)
ARCHITECTURES = (
    "llama",
    "llama-sliding",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "qwen3_moe",
    "deepseek_v3",
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


@pytest.fixture(scope="module")
def real_pair() -> tuple[Any, Any]:
    """Return a part of the bundled model, whose drafter fits it still."""
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    model["model"].layers = [model["model"].layers[number] for number in (0, 7)]
    return model, tokenizer


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Return a narrow random model: its tokens and caches have to be as exact, in less time."""
    model = tiny_llama(head_dim=32)
    return model, mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


def drafters_of(pair: tuple[Any, Any], num_tokens: int = 64) -> dict[str, list[Any]]:
    """Return drafters by name, one for each prompt."""
    model, tokenizer = pair
    knowing = [KnowingDrafter(model, tokenizer.encode(prompt), num_tokens) for prompt in PROMPTS]
    return {
        "random": [random_drafter(model, 512)] * len(PROMPTS),
        "knowing": knowing,
        "hiding": [drafter.hiding() for drafter in knowing],
    }


@pytest.fixture(scope="module")
def drafters(pair: tuple[Any, Any]) -> dict[str, list[Any]]:
    return drafters_of(pair)


@pytest.fixture(scope="module")
def real_drafters(real_pair: tuple[Any, Any]) -> dict[str, list[Any]]:
    """Return drafters of the part of the bundled model, its own among them."""
    own = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), *real_pair)
    return {**drafters_of(real_pair, 32), "bundled": [own] * len(PROMPTS)}


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


@pytest.fixture(scope="module")
def plain_answers(pair: tuple[Any, Any]) -> dict[int, list[list[tuple[int, str, str | None]]]]:
    """Return mlx-lm's answers to every prompt by their length."""
    return {
        length: [seen(plain(pair, prompt, max_tokens=length)) for prompt in PROMPTS]
        for length in NUM_TOKENS.values()
    }


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.beam_width}x{p.draft_length}-{p.nodes}")
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_equals_mlx_lm(
    pair: tuple[Any, Any],
    drafters: dict[str, list[Any]],
    plain_answers: dict[int, list[Any]],
    name: str,
    plan: DraftPlan,
) -> None:
    length = NUM_TOKENS[name]
    for prompt, drafter, answer in zip(PROMPTS, drafters[name], plain_answers[length], strict=True):
        found = ours(pair, prompt, drafter=drafter, plan=plan, max_tokens=length)
        assert seen(found) == answer


def test_bundled_drafter_equals_mlx_lm(bundled_pair: tuple[Any, Any]) -> None:
    drafter = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), *bundled_pair)
    for prompt in PROMPTS[:2]:
        responses = list(ours(bundled_pair, prompt, drafter=drafter, max_tokens=20))
        assert seen(iter(responses)) == seen(plain(bundled_pair, prompt, max_tokens=20))
        assert responses[-1].tokens_per_call > 1.5


def test_knowing_drafters_are_followed(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    """Their tests mean nothing unless whole paths, and paths out of line, are accepted."""
    plan = DraftPlan(4, 5, 21)
    *_, last = ours(pair, PROMPTS[0], drafter=drafters["knowing"][0], plan=plan, max_tokens=61)
    assert last.target_calls == 10
    assert last.acceptance_by_depth == (1.0,) * 5
    *_, last = ours(pair, PROMPTS[0], drafter=drafters["hiding"][0], plan=plan, max_tokens=60)
    assert 2.5 < last.tokens_per_call < 4.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_mlx_lm(pair: tuple[Any, Any], name: str) -> None:
    model = tiny_model(name)
    tokenizer = with_eos(pair[1], set())  # only decodes; the tiny vocabularies are in its first ids
    prompt = [int(t) for t in np.random.default_rng(4).integers(3, 96, 20)]
    expected_cache = make_prompt_cache(model)
    options: dict[str, Any] = {"max_tokens": 24}
    expected = seen(plain((model, tokenizer), prompt, prompt_cache=expected_cache, **options))
    knowing = KnowingDrafter(model, prompt, 40)
    drafters = [random_drafter(model, 60), knowing, knowing.hiding()]
    for drafter in drafters:
        for plan in (DraftPlan(3, 4, 8), DraftPlan(3, 4, tree="beam")):
            cache = make_prompt_cache(model)
            options |= {"drafter": drafter, "plan": plan, "prompt_cache": cache}
            assert seen(ours((model, tokenizer), prompt, **options)) == expected
            assert_equal_caches(cache, expected_cache)
    options["drafter"] = knowing
    *_, last = ours((model, tokenizer), prompt, **options | {"prompt_cache": None})
    assert last.tokens_per_call > 3


def test_known_text_of_a_real_checkpoint(shared: Path) -> None:
    folder = shared / "checkpoints" / "stories260K"
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    known = "\n".join(line.removeprefix("> ") for line in lines if line.startswith("> "))
    pair = mlx_distill.load(folder)
    assert pair[1].encode("Once upon a time") == [1, 403, 407, 261, 378]
    random = random_drafter(pair[0], 128)
    assert mlx_distill.generate(*pair, [1], max_tokens=200).strip() == known
    for drafter in (random, KnowingDrafter(pair[0], [1], 40)):
        begun = mlx_distill.generate(*pair, [1], drafter=drafter, max_tokens=40).strip()
        assert len(begun) > 50
        assert known.startswith(begun)


def test_checkpoint_of_another_layout(shared: Path, pair: tuple[Any, Any]) -> None:
    """The fixture brings no tokenizer: ids go in and come out."""
    model, _ = mlx_lm.utils.load_model(shared / "checkpoints" / "tiny_llama_fixture")
    vocab_size = Target.of(model).vocab_size
    prompt = [int(t) for t in np.random.default_rng(1).integers(3, vocab_size, 9)]
    steps = generate_step(mx.array(prompt), model, max_tokens=30)
    expected = [int(token) for token, _ in steps]
    for drafter in (random_drafter(model), KnowingDrafter(model, prompt, hide=True)):
        state = Decoding(
            Target.of(model),
            drafter,
            FixedPlanner(DraftPlan()),
            Sampling(),
            None,
            CacheConfig(),
            make_prompt_cache(model),
        )
        assert [e.token for e in islice(decode(state, mx.array(prompt)), 30)] == expected


def test_recurrent_architecture_without_drafter(pair: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model("mamba"), with_eos(pair[1], set())
    prompt = [5, 17, 42, 8, 23]
    caches = make_prompt_cache(model), make_prompt_cache(model)
    found = ours((model, tokenizer), prompt, max_tokens=30, prompt_cache=caches[0])
    expected = plain((model, tokenizer), prompt, max_tokens=30, prompt_cache=caches[1])
    assert seen(found) == seen(expected)
    for cache, other in zip(*caches, strict=True):
        states = tree_flatten(cache.state), tree_flatten(other.state)
        for (_, a), (_, b) in zip(*states, strict=True):
            assert mx.allclose(a, b, atol=1e-5).item() if isinstance(a, mx.array) else a == b


def test_without_drafter_is_mlx_lm(
    pair: tuple[Any, Any], plain_answers: dict[int, list[Any]]
) -> None:
    for prompt, expected in zip(PROMPTS, plain_answers[32], strict=True):
        responses = list(ours(pair, prompt, max_tokens=32))
        assert seen(iter(responses)) == expected
        assert responses[-1].target_calls == 31
        assert not any(r.from_draft for r in responses)


def test_log_probs_equal_mlx_lm(pair: tuple[Any, Any], drafters: dict[str, list[Any]]) -> None:
    expected = list(plain(pair, PROMPTS[0], max_tokens=24))
    for name in DRAFTERS:
        found = ours(pair, PROMPTS[0], drafter=drafters[name][0], max_tokens=24)
        for response, other in zip(found, expected, strict=True):
            assert response.logprobs.shape == other.logprobs.shape
            np.testing.assert_allclose(response.logprobs, other.logprobs, atol=1e-4)


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
@pytest.mark.parametrize("name", DRAFTERS)
def test_quantized_cache(
    pair: tuple[Any, Any],
    drafters: dict[str, list[Any]],
    name: str,
    start: int,
    bits: int,
    margin: float,
) -> None:
    """A start of 18 is crossed in the answer: the prompts are shorter.

    The rows of a call with several tokens differ in float32's last bits, and rounding to a few bits
    makes steps of some of them: where the best two tokens are that near, they may change places.
    """
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}
    for prompt, drafter in zip(PROMPTS[:2], drafters[name], strict=False):
        caches = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])
        expected = list(plain(pair, prompt, max_tokens=20, prompt_cache=caches[1], **options))
        cache = CacheConfig(**options)
        found = list(
            ours(
                pair,
                prompt,
                drafter=drafter,
                cache=cache,
                max_tokens=20,
                prompt_cache=caches[0],
                plan=DraftPlan(3, 5, 12),
            )
        )
        assert all(isinstance(cache, QuantizedKVCache) for cache in caches[0])
        different = first_difference(found, expected)
        if different is None:
            assert_equal_caches(*caches)
        else:
            assert different[1] < margin, different


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


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("size", "keep"), [(16, 4), (16, 0), (9, 4)])
def test_window_that_wraps(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str, size: int, keep: int
) -> None:
    """The answer is several windows long, some prompts are longer than one.

    The draft is longer than the smallest window, beside the tokens that stay.
    """
    plan = DraftPlan(3, 7, 15)
    for prompt, drafter in zip(PROMPTS[:2], drafters[name], strict=False):
        caches = [
            [RotatingKVCache(max_size=size, keep=keep) for _ in pair[0].layers] for _ in range(2)
        ]
        expected = plain(pair, prompt, max_tokens=24, prompt_cache=caches[1])
        options: dict[str, Any] = {"drafter": drafter, "plan": plan, "prompt_cache": caches[0]}
        assert seen(ours(pair, prompt, max_tokens=24, **options)) == seen(expected)
        assert_equal_caches(*caches)


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


# --------------------------------------------------------------------------------------- ends


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


# ------------------------------------------------------------------------------ logits processors


@pytest.mark.parametrize("name", DRAFTERS)
def test_repetition_penalty_equals_mlx_lm(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    for prompt, drafter in zip(PROMPTS[:2], drafters[name], strict=False):
        make = lambda: make_logits_processors({9: 3.0}, repetition_penalty=1.3)  # noqa: E731
        expected = seen(plain(pair, prompt, max_tokens=16, logits_processors=make()))
        for plan in (DraftPlan(), DraftPlan(4, 5, tree="beam")):
            options: dict[str, Any] = {"logits_processors": make(), "plan": plan}
            found = seen(ours(pair, prompt, drafter=drafter, max_tokens=16, **options))
            assert found == expected


class Recorder:
    """A processor with a memory: it forbids the token it has seen last, every third call."""

    def __init__(self) -> None:
        self.histories: list[list[int]] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.histories.append(tokens.tolist())
        assert logits.ndim == 2
        if len(self.histories) % 3:
            return logits
        forbidden = mx.arange(logits.shape[-1]) == mx.argmax(logits, axis=-1)
        return mx.where(forbidden[None], -mx.inf, logits)


@pytest.mark.parametrize("name", ["none", *DRAFTERS])
def test_processors_see_the_text_once_and_in_order(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str
) -> None:
    prompt = pair[1].encode(PROMPTS[0])
    theirs, mine = Recorder(), Recorder()
    expected = seen(plain(pair, prompt, max_tokens=30, logits_processors=[theirs]))
    drafter = None if name == "none" else drafters[name][0]
    options: dict[str, Any] = {"logits_processors": [mine], "drafter": drafter}
    assert seen(ours(pair, prompt, max_tokens=30, **options)) == expected
    # The calls beyond the text are for tokens that nobody asked for any more.
    assert mine.histories[:30] == theirs.histories[:30]
    answer = [token for token, _, _ in expected]
    for place, history in enumerate(mine.histories[:30]):
        assert history == prompt + answer[:place]


def test_processors_on_a_chain(pair: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model("gpt_bigcode"), with_eos(pair[1], set())
    prompt = [5, 17, 42, 8, 23]
    drafter = KnowingDrafter(model, prompt)
    theirs, mine = Recorder(), Recorder()
    options: dict[str, Any] = {"max_tokens": 30}
    expected = plain((model, tokenizer), prompt, logits_processors=[theirs], **options)
    options |= {"drafter": drafter, "logits_processors": [mine]}
    assert seen(ours((model, tokenizer), prompt, **options)) == seen(expected)
    assert mine.histories[:30] == theirs.histories[:30]


def test_log_probs_are_those_after_the_processors(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]]
) -> None:
    """As mlx-lm's: the distribution that the token was chosen from."""
    make = lambda: make_logits_processors({9: 3.0}, repetition_penalty=1.3)  # noqa: E731
    expected = list(plain(pair, PROMPTS[0], max_tokens=12, logits_processors=make()))
    options: dict[str, Any] = {"drafter": drafters["knowing"][0], "logits_processors": make()}
    found = ours(pair, PROMPTS[0], max_tokens=12, **options)
    for place, (response, other) in enumerate(zip(found, expected, strict=True)):
        difference = mx.abs(response.logprobs - other.logprobs).max().item()
        assert difference < 1e-4, f"token {place}"


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", ["none", *DRAFTERS])
def test_seed_repeats(pair: tuple[Any, Any], drafters: dict[str, list[Any]], name: str) -> None:
    drafter = None if name == "none" else drafters[name][0]
    options = {"drafter": drafter, "temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    runs = [seen(ours(pair, PROMPTS[0], seed=seed, **options)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    mx.random.seed(0)  # the global generator plays no part
    assert seen(ours(pair, PROMPTS[0], seed=3, **options)) == runs[0]


LAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 40, "min_p": 0.02},
)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_text_of_a_seed_is_the_same_whatever_drafts(
    pair: tuple[Any, Any],
    drafters: dict[str, list[Any]],
    real_pair: tuple[Any, Any],
    real_drafters: dict[str, list[Any]],
    law: dict[str, Any],
) -> None:
    """The n-th token is decided by the model and the n-th row of noise, not by the drafts.

    That is exactness at any temperature: the plain loop draws from the model's distribution.
    """
    plans = (DraftPlan(3, 6, 5), DraftPlan(4, 3, tree="beam"), DraftPlan(1, 2, 3))
    of_pair = [(drafters[name][0], plan) for name, plan in zip(DRAFTERS, plans, strict=True)]
    of_real = [(real_drafters["bundled"][0], DraftPlan())]
    long = 70 if law == LAWS[0] else 24  # more than a block of noise
    for models, every, length in ((pair, of_pair, long), (real_pair, of_real, 24)):
        options: dict[str, Any] = {"seed": 3, "max_tokens": length, **law}
        expected = seen(ours(models, PROMPTS[0], **options))
        for drafter, plan in every:
            assert seen(ours(models, PROMPTS[0], drafter=drafter, plan=plan, **options)) == expected


def test_processors_leave_the_text_of_a_seed_alone(
    real_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    """Then the host walks, node by node."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 24}
    expected = seen(ours(real_pair, PROMPTS[1], **options))
    options["logits_processors"] = [lambda tokens, logits: logits]
    for one in (None, real_drafters["bundled"][1], real_drafters["hiding"][1]):
        assert seen(ours(real_pair, PROMPTS[1], drafter=one, **options)) == expected


def test_drafts_in_sight_of_the_noise_are_accepted_more_often(
    real_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    drafter = real_drafters["bundled"][0]

    class Blind:
        taps = ()

        def open(self, prompt: mx.array, features: Features) -> KnowingState:
            return KnowingState(drafter, features)

    def accepted(drafter: Any) -> int:
        total = 0
        for seed, prompt in enumerate(PROMPTS):
            options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 48}
            *_, last = ours(real_pair, prompt, drafter=drafter, **options)
            total += last.accepted_tokens
        return total

    assert accepted(drafter) > 1.1 * accepted(Blind())


def test_without_seed_runs_differ(pair: tuple[Any, Any], drafters: dict[str, list[Any]]) -> None:
    options = {"drafter": drafters["random"][0], "temperature": 1.0, "max_tokens": 24}
    assert seen(ours(pair, PROMPTS[0], **options)) != seen(ours(pair, PROMPTS[0], **options))


@pytest.mark.parametrize("law", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_that_leave_one_token_are_greedy(
    pair: tuple[Any, Any],
    drafters: dict[str, list[Any]],
    plain_answers: dict[int, list[Any]],
    law: dict[str, float],
) -> None:
    for drafter in (None, drafters["hiding"][0]):
        options: dict[str, Any] = {"drafter": drafter, "temperature": 1.5, **law}
        assert seen(ours(pair, PROMPTS[0], max_tokens=32, **options)) == plain_answers[32][0]


# -------------------------------------------------------------------------------------- the loop


def test_one_host_read_per_cycle(
    pair: tuple[Any, Any], drafters: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token is read alone, then every call of the target is read once."""
    reads = []

    def counting(array: mx.array) -> list[Any]:
        reads.append(array.shape)
        return array.tolist()

    def forbidden(array: mx.array) -> float:
        raise AssertionError("a number was read inside a cycle")

    for module in (cycle_module, decoding_module):
        monkeypatch.setattr(module, "to_host", counting)
    monkeypatch.setattr(cycle_module, "to_number", forbidden)
    for name in DRAFTERS:
        for temperature in (0.0, 1.0):
            reads.clear()
            options: dict[str, Any] = {"drafter": drafters[name][0], "max_tokens": 30}
            *_, last = ours(pair, PROMPTS[0], temperature=temperature, seed=1, **options)
            assert len(reads) == last.target_calls + 1


def test_nothing_is_drafted_where_the_plan_has_no_room(
    pair: tuple[Any, Any], plain_answers: dict[int, list[Any]]
) -> None:
    class Refusing:
        taps = ()

        def open(self, prompt: mx.array, features: Features) -> KnowingState:
            return KnowingState(self, features)

        def draft(self, *args: Any) -> Draft:
            raise AssertionError("one node leaves no room for a draft")

    found = list(ours(pair, PROMPTS[0], drafter=Refusing(), plan=DraftPlan(nodes=1), max_tokens=32))
    assert seen(iter(found)) == plain_answers[32][0]
    assert found[-1].drafted_tokens == 0
    assert found[-1].verified_tokens == found[-1].target_calls == 31


def test_another_thread_generates_and_reads(
    real_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    """MLX's default streams belong to threads; models, drafters and responses must not."""
    drafter = real_drafters["bundled"][0]
    here = list(ours(real_pair, PROMPTS[0], drafter=drafter, max_tokens=8))
    cache = make_prompt_cache(real_pair[0])
    found: dict[str, Any] = {}

    def work() -> None:
        options: dict[str, Any] = {"drafter": drafter, "max_tokens": 32}
        found["text"] = seen(ours(real_pair, PROMPTS[0], prompt_cache=cache, **options))
        found["sampled"] = seen(ours(real_pair, PROMPTS[0], temperature=1.0, seed=2, **options))
        found["sums"] = [mx.exp(response.logprobs).sum().item() for response in here]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["text"] == seen(plain(real_pair, PROMPTS[0], max_tokens=32))
    options = {"drafter": drafter, "temperature": 1.0, "seed": 2, "max_tokens": 32}
    assert found["sampled"] == seen(ours(real_pair, PROMPTS[0], **options))
    np.testing.assert_allclose(found["sums"], 1, atol=1e-4)


def test_another_law_compiles_nothing(
    real_pair: tuple[Any, Any],
    real_drafters: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = real_drafters["bundled"][0]
    options: dict[str, Any] = {"drafter": drafter, "seed": 0, "max_tokens": 3}
    list(ours(real_pair, PROMPTS[0], temperature=1.0, **options))

    def compile(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("something is compiled")

    monkeypatch.setattr(mx, "compile", compile)
    for temperature, top_p, top_k in [(0.5, 1.0, 0), (1.2, 0.9, 0), (1.0, 0.7, 9)]:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        list(ours(real_pair, PROMPTS[0], **options))


def test_a_drafter_keeps_few_compiled_searches(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those used last; and threads that draft at once do not take each other's away."""
    monkeypatch.setattr(bound, "MOST_COMPILED", 2)  # so that many are freed, by any thread
    drafter = random_drafter(pair[0], 64)
    hidden, root = mx.zeros((64,)), mx.array([5])
    mx.eval(hidden, root)
    found = []

    def work(first: int) -> None:
        with mx.stream(generation_stream):
            for length in range(first, first + 24):
                draft = drafter.draft(hidden, root, DraftPlan(1, 1 + length % 3))
                found.append(draft.tokens.size == 2 + length % 3)

    monkeypatch.setattr(bound, "DRAFTS_BEFORE_TABLES", 36)
    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 72
    assert len(drafter.searches) == 2


@pytest.mark.parametrize("name", ["bundled", "hiding"])
@pytest.mark.parametrize(
    "law", [{"top_p": 0.9}, {"top_p": 0.99}, {"top_k": 24}, {"top_p": 0.95, "min_p": 0.01}], ids=str
)
def test_filters_that_look_at_few_tokens_change_no_text(
    real_pair: tuple[Any, Any],
    real_drafters: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    law: dict[str, Any],
    name: str,
) -> None:
    """Some draws are not certain then, and have to be made again; the drafts behind them, too."""
    drafter = real_drafters[name][0]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 28, **law}
    expected = seen(ours(real_pair, PROMPTS[0], **options))
    again = []
    walk_again = cycle_module.sample
    monkeypatch.setattr(filters, "CANDIDATES", 24)
    monkeypatch.setattr(cycle_module, "sample", lambda *a: again.append(a) or walk_again(*a))
    assert seen(ours(real_pair, PROMPTS[0], drafter=drafter, **options)) == expected
    assert len(again) < 40
    if law["top_p" if "top_p" in law else "top_k"] == 0.99:
        assert again  # far more than 24 tokens hold so much


def test_model_is_as_before(pair: tuple[Any, Any], drafters: dict[str, list[Any]]) -> None:
    """A drafted text leaves nothing in the model that changes plain decoding."""
    before = seen(plain(pair, PROMPTS[2], max_tokens=16))
    mlx_distill.generate(*pair, PROMPTS[2], drafter=drafters["hiding"][2], max_tokens=16)
    assert seen(plain(pair, PROMPTS[2], max_tokens=16)) == before


def test_two_texts_at_once(pair: tuple[Any, Any], drafters: dict[str, list[Any]]) -> None:
    """Generators that are advanced in turn do not disturb each other."""
    expected = [seen(plain(pair, prompt, max_tokens=20)) for prompt in PROMPTS[:2]]
    both = [
        ours(pair, prompt, drafter=drafter, max_tokens=20)
        for prompt, drafter in zip(PROMPTS, drafters["hiding"][:2], strict=False)
    ]
    found = list(zip(*(seen(part) for part in both), strict=True))
    assert found == list(zip(*expected, strict=True))
    turns: list[list[Any]] = [[], []]
    both = [
        ours(pair, prompt, drafter=drafter, max_tokens=20)
        for prompt, drafter in zip(PROMPTS, drafters["hiding"][:2], strict=False)
    ]
    for one, other in zip(*both, strict=True):
        turns[0].append((one.token, one.text, one.finish_reason))
        turns[1].append((other.token, other.text, other.finish_reason))
    assert turns == expected
