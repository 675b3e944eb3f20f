"""A model that drafts: what, what its cache holds, and that texts are those without it."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import assert_equal_caches
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, DraftModelDrafter, DraftPlan, InputError
from mlx_distill.arrays import log_probs
from mlx_distill.core.sampling import TextNoise
from mlx_distill.drafters.protocol import Drafter, DraftState, Features

NOTHING = Features(mx.zeros((1, 4)))
PROMPTS = "Once upon a time", "Tom and Lily went to the", "One day, a big dog"
TREE = DraftPlan(4, 4, 8)
VOCAB = 97


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


def tokens_of(pair: tuple[Any, Any], prompt: Any, **options: Any) -> list[int]:
    return [one.token for one in mlx_distill.stream_generate(*pair, prompt, **options)]


def test_it_is_a_drafter() -> None:
    drafter = DraftModelDrafter(tiny_model("llama"), VOCAB)
    assert isinstance(drafter, Drafter)
    state = drafter.open(mx.array([1]), NOTHING)
    assert isinstance(state, DraftState)


# What it drafts, against the model called on whole texts


def slow_beams(
    model: nn.Module, text: list[int], width: int, noise: np.ndarray
) -> list[tuple[int, ...]]:
    """Return all paths that a beam search keeps, depth by depth."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    kept = []
    for row in noise:
        options = []
        for path, score in beams:
            logits = model(mx.array([[*text, *path]]))[0, -1].astype(mx.float32) + mx.array(row)
            shares = np.array(log_probs(logits))
            options += [((*path, token), score + share) for token, share in enumerate(shares)]
        beams = sorted(options, key=lambda option: -option[1])[:width]
        kept += [path for path, _ in beams]
    return kept


def paths_of(draft: Any) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.tokens.tolist()[1:], draft.parents.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


# Caches that drop tokens; a window that is full; a recurrent state, which takes chains.
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2"])
@pytest.mark.parametrize("width", [1, 3])
def test_drafts_are_the_models_beams_whatever_was_drafted_before(name: str, width: int) -> None:
    """Accepted, rejected, rewound: always what the whole text would make it draft."""
    model = tiny_model(name)
    random = np.random.default_rng(width)
    plan = DraftPlan(width, 3, 8)
    text = random.integers(0, VOCAB, 20).tolist()
    state = DraftModelDrafter(model, VOCAB).open(mx.array(text), NOTHING)
    for cycle in range(8):
        root = int(random.integers(VOCAB))
        noise = random.gumbel(size=(3, VOCAB)).astype(np.float32) * (cycle % 2)
        draft = state.draft(mx.array([root]), plan, mx.array(noise))
        chain = width == 1 or name != "llama"
        expected = slow_beams(model, [*text, root], 1 if chain else width, noise)
        found = paths_of(draft)
        assert sorted(found) == sorted(expected)
        if cycle == 2:
            continue  # asked once more, with another root
        longest = max(expected, key=len)
        path = [root, *longest[: int(random.integers(4))]]
        if cycle in (3, 6):  # a branch of another drafter's
            path = [root, int(random.integers(VOCAB))]
        state.accept(mx.array([*path, *[-1] * (4 - len(path))]), NOTHING)
        if cycle in (4, 5):
            state.rewind(len(path))
            path = [root]
            state.accept(mx.array(path), NOTHING)
        text += path


def test_heads_of_other_widths_share_what_both_have() -> None:
    """A target with fewer logits is never offered one it lacks; one with more can write more."""
    model = tiny_model("llama")
    narrow = DraftModelDrafter(model, 40).open(mx.array([5, 6]), NOTHING)
    draft = narrow.draft(mx.array([7]), DraftPlan(1, 8, 9), mx.zeros((8, 40)))
    assert max(draft.tokens.tolist()) < 40
    wide = DraftModelDrafter(model, VOCAB + 31)
    state = wide.open(mx.array([5, VOCAB + 3]), NOTHING)  # read as its last row
    draft = state.draft(mx.array([VOCAB + 30]), DraftPlan(1, 2, 3), mx.zeros((2, VOCAB + 31)))
    like = DraftModelDrafter(model, VOCAB).open(mx.array([5, VOCAB - 1]), NOTHING)
    other = like.draft(mx.array([VOCAB - 1]), DraftPlan(1, 2, 3), None)
    assert draft.tokens.tolist()[1:] == other.tokens.tolist()[1:]


# Whole texts


@pytest.mark.parametrize(
    ("plans", "law"),
    [
        ((None, TREE, DraftPlan(tree="beam")), {}),
        ((None,), {"temperature": 1.0, "seed": 3}),
        ((TREE,), {"temperature": 0.8, "seed": 3, "top_p": 0.9}),
    ],
    ids=["greedy", "drawn", "filtered"],
)
def test_texts_are_those_without(
    pair: tuple[Any, Any],
    small: nn.Module,
    law: dict[str, Any],
    plans: tuple[DraftPlan | None, ...],
) -> None:
    options: dict[str, Any] = {"max_tokens": 20, **law}
    expected = tokens_of(pair, PROMPTS[0], **options)
    options |= {"draft_model": small, "draft_verification": "coupled"}
    for plan in plans:
        assert tokens_of(pair, PROMPTS[0], plan=plan, **options) == expected, plan


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processors": make_logits_processors(repetition_penalty=1.2)},
        {"cache": CacheConfig(max_kv_size=24)},
        {"cache": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=8)},
    ],
    ids=["processors", "window", "quantised"],
)
def test_settings_are_those_of_plain_texts(
    pair: tuple[Any, Any], small: nn.Module, options: dict[str, Any]
) -> None:
    options = {"max_tokens": 32, **options}
    expected = tokens_of(pair, PROMPTS[0], **options)
    found = tokens_of(pair, PROMPTS[0], draft_model=small, num_draft_tokens=4, **options)
    same = sum(
        1
        for _ in itertools.takewhile(
            lambda two: two[0] == two[1], zip(found, expected, strict=True)
        )
    )
    assert same == 32 or "cache" in options  # quantised and full windows may round otherwise
    assert same > 8


def test_a_model_that_drafts_for_itself_is_always_right(pair: tuple[Any, Any]) -> None:
    for law in ({}, {"temperature": 1.0, "seed": 5}):
        options: dict[str, Any] = {"draft_model": pair[0], "num_draft_tokens": 4, **law}
        *_, last = mlx_distill.stream_generate(*pair, PROMPTS[0], max_tokens=26, **options)
        assert last.target_calls == 5  # of 5 tokens each, behind the first


def calls_of_mlx_lm(
    pair: tuple[Any, Any], small: nn.Module, first: list[int], length: int, **law: Any
) -> int:
    """Return the calls of mlx-lm's own loop behind a prompt and the first token of the answer.

    They are counted where they are made: a response that was not drafted is not one for every call,
    because a text may end among drafted ones.
    """
    mx.random.seed(4)
    options: dict[str, Any] = {"draft_model": small, "num_draft_tokens": 3, "max_tokens": length}
    sampler = make_sampler(law.get("temperature", 0.0))
    with counted_calls(pair[0]) as rows:
        list(mlx_lm.stream_generate(*pair, first, sampler=sampler, **options))
    return len(rows) - 1  # the first reads the prompt


@contextlib.contextmanager
def counted_calls(model: nn.Module) -> Iterator[list[int]]:
    """Note how many rows every call of a model reads."""
    kind, rows = type(model), []
    call = kind.__call__

    def noted(self: nn.Module, inputs: mx.array, *arguments: Any, **more: Any) -> Any:
        if self is model:
            rows.append(inputs.size)
        return call(self, inputs, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", noted)
        yield rows


def test_calls_are_mlx_lms_at_temperature_0_and_fewer_above(
    pair: tuple[Any, Any], small: nn.Module
) -> None:
    """With noise in sight, the two models draw the same token more often."""
    for law, length in (({}, 17), ({"temperature": 1.0, "seed": 4}, 33)):
        more = []
        for prompt in PROMPTS:
            ids = pair[1].encode(prompt)
            options: dict[str, Any] = {"draft_model": small, "max_tokens": length, **law}
            found = list(mlx_distill.stream_generate(*pair, ids, **options))
            theirs = calls_of_mlx_lm(pair, small, [*ids, found[0].token], length - 1, **law)
            more.append(theirs - found[-1].target_calls)
        assert more == [0, 0, 0] if not law else sum(more) > 2


def test_coupled_draws_agree_more_often_than_independent_ones() -> None:
    """Draft and target take the best of their logits and the same noise, a row per place."""
    random = np.random.default_rng(0)
    p, q = (np.exp(log_probs(mx.array(random.normal(size=6)))) for _ in range(2))
    noise = TextNoise(mx.random.key(1), 6).rows(0, 40_000)
    draws = [np.array(mx.argmax(mx.log(mx.array(x)) + noise, axis=-1)) for x in (p, q)]
    for draw, law in zip(draws, (p, q), strict=True):  # each is drawn from its own law
        counts = np.bincount(draw, minlength=6)
        assert ((counts - 40_000 * law) ** 2 / (40_000 * law)).sum() < 25.7  # chi2(5): 1e-4
    agreed, overlap = (draws[0] == draws[1]).mean(), np.minimum(p, q).sum()
    assert (p * q).sum() + 0.05 < agreed < overlap + 0.01
    assert agreed > overlap / (2 - overlap) - 0.01  # the least of this coupling


# Conversations


@pytest.mark.parametrize("end", [16, 7, 1])
def test_a_prompt_cache_of_both_models_goes_on(
    pair: tuple[Any, Any], small: nn.Module, end: int
) -> None:
    """As mlx-lm keeps it: the target's layers, then the draft model's; the caller may leave."""
    model, ids = pair[0], pair[1].encode(PROMPTS[0])
    caches = [*make_prompt_cache(model), *make_prompt_cache(small)]
    options: dict[str, Any] = {"draft_model": small, "prompt_cache": caches, "max_tokens": 16}
    texts = mlx_distill.stream_generate(*pair, ids, **options)
    answer = [one.token for one in itertools.islice(texts, end)]
    texts.close()
    assert {cache.offset for cache in caches} == {len(ids) + end}
    whole = [*ids, *answer]
    for part, one in ((caches[: len(model.layers)], model), (caches[len(model.layers) :], small)):
        expected = make_prompt_cache(one)
        one(mx.array([whole]), cache=expected)
        assert_equal_caches(part, expected)
    more = tokens_of(pair, [13], **options)
    assert more == tokens_of(pair, [*whole, 13], max_tokens=16)


@pytest.mark.parametrize("call", [2, 5])
@pytest.mark.parametrize("kinds", [("llama", "llama"), ("llama", "mamba2"), ("mamba2", "llama")])
def test_an_interrupted_draft_leaves_both_models_with_the_text(
    pair: tuple[Any, Any], kinds: tuple[str, str], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when some layers of the draft model have read and others not, and once more then."""
    model, small = map(tiny_model, kinds)
    layer, counted = small.layers[1], itertools.count(1)
    whole = type(layer).__call__

    def torn(self: Any, *args: Any, **options: Any) -> Any:
        if self is layer and 0 <= next(counted) - call < 2:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    prompt, found = [3, 5, 7, 3, 5, 7, 3], []
    caches = [*make_prompt_cache(model), *make_prompt_cache(small)]
    options: dict[str, Any] = {"draft_model": small, "prompt_cache": caches, "max_tokens": 8}
    texts = mlx_distill.stream_generate(model, pair[1], prompt, **options)
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", torn)
        with contextlib.suppress(KeyboardInterrupt):
            found.extend(one.token for one in texts)
    assert 0 < len(found) < 8
    size = len(make_prompt_cache(model))
    for one, part in ((model, caches[:size]), (small, caches[size:])):
        expected = make_prompt_cache(one)
        mx.eval(one(mx.array([[*prompt, *found]]), cache=expected))
        goes_on, right = (np.array(one(mx.array([[9]]), cache=held)) for held in (part, expected))
        np.testing.assert_allclose(goes_on, right, atol=1e-4)


def test_a_prompt_cache_of_something_else_is_refused(
    pair: tuple[Any, Any], small: nn.Module
) -> None:
    caches = make_prompt_cache(pair[0])[:-1]
    size = len(caches) + 1
    said = f"has {size - 1} layers; the model has {size}, with its draft model {size + 1}"
    with pytest.raises(InputError, match=said):
        tokens_of(pair, [5], draft_model=small, prompt_cache=caches)
    with pytest.raises(InputError, match=f"has {size - 1} layers; the model has {size}$"):
        tokens_of(pair, [5], prompt_cache=caches)


# Bad input


@pytest.mark.parametrize("which", ["target", "draft"])
def test_drafts_beyond_a_window_are_refused(pair: tuple[Any, Any], which: str) -> None:
    model = tiny_model("gemma3_text")
    size = min(getattr(cache, "max_size", 10**9) for cache in make_prompt_cache(model))
    models = (model, tiny_model("llama"))[:: 1 if which == "target" else -1]
    options: dict[str, Any] = {"draft_model": models[1], "num_draft_tokens": size}
    with pytest.raises(InputError, match=f"must be below the window's {size} tokens, got {size}"):
        tokens_of((models[0], pair[1]), [5], **options)


def test_a_drafter_and_a_draft_model_exclude_each_other(
    pair: tuple[Any, Any], small: nn.Module
) -> None:
    options: dict[str, Any] = {"draft_model": small, "drafter": mlx_distill.NGramDrafter()}
    with pytest.raises(InputError, match="exclude each other"):
        tokens_of(pair, [5], **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", [None, TREE])
def test_nothing_is_drafted_behind_the_last_position(
    pair: tuple[Any, Any], temperature: float, plan: DraftPlan | None
) -> None:
    """A table of positions is never asked for a row behind its last one."""
    target, limit = tiny_model("llama"), 24
    draft_model: Any = tiny_model("gpt2", n_positions=limit)
    asked: list[int] = []
    table, look = draft_model.model.wpe, type(draft_model.model.wpe).__call__

    class Watched(type(table)):
        def __call__(self, positions: mx.array) -> mx.array:
            asked.append(int(positions.max().item()))
            return look(self, positions)

    options = {"temperature": temperature, "top_k": 1, "max_tokens": 60}
    plain = tokens_of((target, pair[1]), [1, 2, 3], **options)
    table.__class__ = Watched
    drafted = tokens_of(
        (target, pair[1]), [1, 2, 3], draft_model=draft_model, seed=1, plan=plan, **options
    )
    assert drafted == plain
    assert max(asked) == limit - 1


def test_a_cache_of_both_goes_on_without_what_the_draft_model_has_no_positions_for(
    pair: tuple[Any, Any],
) -> None:
    target, draft_model = tiny_model("llama"), tiny_model("gpt2", n_positions=24)
    caches = [*make_prompt_cache(target), *make_prompt_cache(draft_model)]
    options = {"draft_model": draft_model, "prompt_cache": caches}
    text = [1, 2, 3]
    whole, alone = len(caches), len(target.layers)
    for count, layers in ((8, whole), (30, alone), (5, alone)):
        more = tokens_of((target, pair[1]), text[-3:], max_tokens=count, **options)
        assert len(caches) == layers
        assert more == tokens_of((target, pair[1]), text, max_tokens=count)
        text += [*more, 4, 5, 6]
