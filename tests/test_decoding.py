"""Decoding with a drafter against mlx-lm's own loop: its tokens, and what the loop itself does."""

import itertools
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import (
    DRAFTERS,
    NUM_TOKENS,
    PROMPTS,
    KnowingDrafter,
    KnowingState,
    assert_equal_caches,
    ours,
    plain,
    random_drafter,
    seen,
    with_eos,
)
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import (
    make_prompt_cache,
)
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, DraftPlan
from mlx_distill.core.draft import Draft
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters import bound, compiling
from mlx_distill.drafters.protocol import Features, FixedPlanner
from mlx_distill.speculation import cycle as cycle_module
from mlx_distill.speculation import decoding as decoding_module
from mlx_distill.speculation.cycle import Decoding
from mlx_distill.speculation.decoding import decode
from mlx_distill.target.target import Target

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


def test_bundled_drafter_equals_mlx_lm(bundled_pair: tuple[Any, Any], bundled_drafter: Any) -> None:
    for prompt in PROMPTS[:2]:
        responses = list(ours(bundled_pair, prompt, drafter=bundled_drafter, max_tokens=20))
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


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_mlx_lm(pair: tuple[Any, Any], name: str) -> None:
    model = tiny_model(name)
    tokenizer = with_eos(pair[1], set())  # only decodes; the tiny vocabularies are in its first ids
    prompt = [int(t) for t in np.random.default_rng(4).integers(3, 96, 20)]
    knowing = KnowingDrafter(model, prompt, 28)
    shapes = DraftPlan(3, 4, 8), DraftPlan(3, 4, tree="beam"), DraftPlan(1, 4, 5)
    # Random drafts are wrong: a call for every token.
    for several, length in (((random_drafter(model, 60),), 8), ((knowing, knowing.hiding()), 24)):
        options: dict[str, Any] = {"max_tokens": length}
        cache = expected_cache = make_prompt_cache(model)
        expected = seen(plain((model, tokenizer), prompt, prompt_cache=cache, **options))
        for drafter, plan in itertools.product(several, shapes):
            cache = make_prompt_cache(model)
            options |= {"drafter": drafter, "plan": plan, "prompt_cache": cache}
            found = list(ours((model, tokenizer), prompt, **options))
            assert seen(iter(found)) == expected
            assert_equal_caches(cache, expected_cache)
            assert drafter is not knowing or found[-1].tokens_per_call > 3


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
    bundled_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    """MLX's default streams belong to threads; models, drafters and responses must not."""
    drafter = real_drafters["bundled"][0]
    here = list(ours(bundled_pair, PROMPTS[0], drafter=drafter, max_tokens=8))
    cache = make_prompt_cache(bundled_pair[0])
    found: dict[str, Any] = {}

    def work() -> None:
        options: dict[str, Any] = {"drafter": drafter, "max_tokens": 16}
        found["text"] = seen(ours(bundled_pair, PROMPTS[0], prompt_cache=cache, **options))
        found["sampled"] = seen(ours(bundled_pair, PROMPTS[0], temperature=1.0, seed=2, **options))
        found["sums"] = [mx.exp(response.logprobs).sum().item() for response in here]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["text"] == seen(plain(bundled_pair, PROMPTS[0], max_tokens=16))
    options = {"drafter": drafter, "temperature": 1.0, "seed": 2, "max_tokens": 16}
    assert found["sampled"] == seen(ours(bundled_pair, PROMPTS[0], **options))
    np.testing.assert_allclose(found["sums"], 1, atol=1e-4)


def test_a_drafter_keeps_few_compiled_searches(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those used last; and threads that draft at once do not take each other's away."""
    monkeypatch.setattr(compiling, "COMPILED_AT", 1)
    monkeypatch.setattr(compiling, "MOST_COMPILED", 2)  # so that many are freed, by any thread
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
