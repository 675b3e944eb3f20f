"""Logits processors, seeds and laws: a text does not depend on what drafts it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from drafting import DRAFTERS, PROMPTS, KnowingDrafter, KnowingState, ours, plain, seen, with_eos
from mlx_lm.sample_utils import make_logits_processors
from tiny_models import tiny_model

from mlx_distill import DraftPlan, batch_generate
from mlx_distill.core import filters
from mlx_distill.drafters.protocol import Features
from mlx_distill.speculation import cycle as cycle_module

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
    bundled_pair: tuple[Any, Any],
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
    for models, every, length in ((pair, of_pair, long), (bundled_pair, of_real, 16)):
        options: dict[str, Any] = {"seed": 3, "max_tokens": length, **law}
        expected = seen(ours(models, PROMPTS[0], **options))
        for drafter, plan in every:
            assert seen(ours(models, PROMPTS[0], drafter=drafter, plan=plan, **options)) == expected


def test_processors_leave_the_text_of_a_seed_alone(
    bundled_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    """Then the host walks, node by node."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 24}
    expected = seen(ours(bundled_pair, PROMPTS[1], **options))
    options["logits_processors"] = [lambda tokens, logits: logits]
    for one in (None, real_drafters["bundled"][1], real_drafters["hiding"][1]):
        assert seen(ours(bundled_pair, PROMPTS[1], drafter=one, **options)) == expected


def test_drafts_in_sight_of_the_noise_are_accepted_more_often(
    bundled_pair: tuple[Any, Any], real_drafters: dict[str, list[Any]]
) -> None:
    drafter = real_drafters["bundled"][0]

    class Blind:
        taps = ()

        def open(self, prompt: mx.array, features: Features) -> KnowingState:
            return KnowingState(drafter, features)

    def accepted(drafter: Any) -> int:
        options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 48, "plan": DraftPlan()}
        each = [{"seed": seed} for seed in range(len(PROMPTS))]
        texts = batch_generate(*bundled_pair, PROMPTS, each=each, drafter=drafter, **options)
        return sum(one.last.accepted_tokens for one in texts if one.last)

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


def test_another_law_compiles_nothing(
    bundled_pair: tuple[Any, Any],
    real_drafters: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nothing is compiled anew, and what is compiled has no number of the law in its source."""
    drafter = real_drafters["bundled"][0]
    options: dict[str, Any] = {"drafter": drafter, "seed": 0, "max_tokens": 3}
    list(ours(bundled_pair, PROMPTS[0], temperature=1.0, **options))

    def compile(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("something is compiled")

    monkeypatch.setenv("TMPDIR", str(tmp_path))  # MLX writes the sources of its kernels there
    monkeypatch.setattr(mx, "compile", compile)
    for temperature, top_p, top_k in [(0.5, 1.0, 0), (1.2, 0.9, 0), (1.0, 0.7, 9)]:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        list(ours(bundled_pair, PROMPTS[0], **options))
    assert not [*tmp_path.rglob("*.cpp")]


@pytest.mark.parametrize(
    "law", [{"top_p": 0.9}, {"top_p": 0.99}, {"top_k": 24}, {"top_p": 0.95, "min_p": 0.01}], ids=str
)
def test_filters_that_look_at_few_tokens_change_no_text(
    bundled_pair: tuple[Any, Any],
    real_drafters: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    law: dict[str, Any],
) -> None:
    """Some draws are not certain then, and have to be made again; the drafts behind them, too."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 20, **law}
    expected = seen(ours(bundled_pair, PROMPTS[0], **options))
    again: list[Any] = []
    walk_again = cycle_module.sample
    monkeypatch.setattr(filters, "CANDIDATES", 24)
    monkeypatch.setattr(cycle_module, "sample", lambda *a: again.append(a) or walk_again(*a))
    for name in ("bundled", "hiding"):
        again.clear()
        drafter = real_drafters[name][0]
        assert seen(ours(bundled_pair, PROMPTS[0], drafter=drafter, **options)) == expected
        assert len(again) < 40
        if law["top_p" if "top_p" in law else "top_k"] == 0.99:
            assert again  # far more than 24 tokens hold so much
