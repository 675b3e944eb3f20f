"""Chains of a draft model, verified as blocks: their law, their ends, and where they are not."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import with_eos
from mlx import nn
from mlx_lm.sample_utils import make_logits_processors
from oracles.sampling import sampling_law
from scipy.stats import chi2
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import DraftPlan, InputError
from mlx_distill.core import block_verification, filters

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


def tokens_of(pair: tuple[Any, Any], prompt: Any = PROMPT, **options: Any) -> list[int]:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 16, **options}
    return [one.token for one in mlx_distill.stream_generate(*pair, prompt, **options)]


# The law, through the loop


def always(p: mx.array, q: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    return mx.ones(tokens.size), p[:-1]


LAW: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


@pytest.mark.parametrize("wrong", [None, always])
def test_a_text_has_the_targets_law(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    """Where a token stands in its law is uniform.

    Tokens are put in the order in which the draft model overrates them, where a bias is seen best.
    The draft model knows fewer tokens.
    """
    if wrong:
        monkeypatch.setattr(block_verification, "acceptance", wrong)
    target: Any = tiny_model("llama", 1, num_hidden_layers=1)
    draft_model: Any = tiny_model("llama", 2, num_hidden_layers=1, vocab_size=90)
    for part in ("embed_tokens", "norm"):
        draft_model.model[part].weight = target.model[part].weight
    draft_model.lm_head.weight = target.lm_head.weight[:90]
    options = {"draft_model": draft_model, "max_tokens": 100, "batch": 4, **LAW}
    each = [{"seed": seed} for seed in range(4)]  # more than a block of noise each
    tokenizer = with_eos(pair[1], set())
    answers = mlx_distill.batch_generate(target, tokenizer, [[1]] * 4, each=each, **options)
    texts = np.array([one.tokens for one in answers])
    whole = mx.array(np.pad(texts[:, :-1], [(0, 0), (1, 0)], constant_values=1))
    p, q = (
        sampling_law(np.array(model(whole)).reshape(400, -1), **LAW)
        for model in (target, draft_model)
    )
    text = texts.reshape(-1)
    overrated = np.pad(q, [(0, 0), (0, p.shape[1] - q.shape[1])]) - p
    order = np.argsort(overrated, axis=1)
    ranked = np.take_along_axis(p, order, axis=1)
    at = order == np.array(text)[:, None]
    below = np.cumsum(ranked, axis=1) - ranked
    place = below[at] + np.random.default_rng(0).random(len(text)) * ranked[at]
    counts = np.bincount(np.minimum(8 * place, 7).astype(int), minlength=8)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert (chi2.sf(statistic, 7) < 1e-3) == bool(wrong)


# Seeds, and where coupled draws are taken instead


def test_a_seed_gives_a_text_once_for_every_draft(pair: tuple[Any, Any], small: nn.Module) -> None:
    plain = tokens_of(pair)
    found = tokens_of(pair, draft_model=small, num_draft_tokens=4)
    assert found == tokens_of(pair, draft_model=small, num_draft_tokens=4)
    assert found[0] == plain[0]  # nothing was drafted yet
    others = [
        plain,
        tokens_of(pair, draft_model=small, num_draft_tokens=2),
        tokens_of(pair, draft_model=small, num_draft_tokens=4, seed=4),
    ]
    assert found not in others


def penalty() -> list[Any]:
    return make_logits_processors(repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"draft_verification": "coupled"}, None),
        ({"temperature": 0.0}, None),
        ({"plan": DraftPlan(2, 3, 6)}, "leave trees out"),
        ({"plan": DraftPlan(1, 3, tree="beam")}, "leave trees out"),
        ({"logits_processors": penalty}, "processors see a text token by token"),
        ({"exact_rows": True}, "exact rows promise the plainly decoded text"),
    ],
    ids=["coupled", "greedy", "a tree", "a beam's tree", "processors", "exact rows"],
)
def test_elsewhere_a_seed_gives_the_text_without(
    pair: tuple[Any, Any], small: nn.Module, options: dict[str, Any], why: str | None
) -> None:
    def asked() -> dict[str, Any]:
        return {name: value() if callable(value) else value for name, value in options.items()}

    plain = {name: value for name, value in asked().items() if name != "draft_verification"}
    assert tokens_of(pair, draft_model=small, **asked()) == tokens_of(pair, **plain)
    if why:
        with pytest.raises(InputError, match=why):
            tokens_of(pair, draft_model=small, draft_verification="block", **asked())


def test_what_is_no_verification_is_refused(pair: tuple[Any, Any], small: nn.Module) -> None:
    with pytest.raises(InputError, match="draft_verification must be block or coupled, got other"):
        tokens_of(pair, draft_model=small, draft_verification="other")


# Ends, batches, doubts


def test_more_drafts_than_tokens_are_left(pair: tuple[Any, Any], small: nn.Module) -> None:
    options: dict[str, Any] = {"draft_model": small, "num_draft_tokens": 6}
    whole = tokens_of(pair, max_tokens=12, **options)
    for limit in (1, 2, 5, 9):
        assert tokens_of(pair, max_tokens=limit, **options) == whole[:limit]
        ends = pair[0], with_eos(pair[1], {whole[limit]})
        first = whole.index(whole[limit])
        assert tokens_of(ends, max_tokens=12, **options) == whole[: first + 1]


def test_texts_of_a_batch_are_those_alone(pair: tuple[Any, Any], small: nn.Module) -> None:
    prompts = [PROMPT, "Tom and Lily went to the", "One"]
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "draft_model": small}
    each = [{"seed": seed} for seed in range(3)]
    answers = mlx_distill.batch_generate(*pair, prompts, each=each, batch=3, **options)
    alone = [
        tokens_of(pair, prompt, **options, **own) for prompt, own in zip(prompts, each, strict=True)
    ]
    assert [one.tokens for one in answers] == alone
    assert all(one.last and one.last.accepted_tokens for one in answers)


def test_filters_in_doubt_look_at_all_tokens(
    pair: tuple[Any, Any], small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three candidates, most of the mass is somewhere else; the likeliest alone is certain."""
    monkeypatch.setattr(filters, "CANDIDATES", 3)
    model = pair[0]
    text = tokens_of(pair, draft_model=small, top_p=0.9, max_tokens=24)
    ids = pair[1].encode(PROMPT)
    logits = model(mx.array([[*ids, *text]]))[0, len(ids) - 1 : -1]
    law = sampling_law(np.array(logits), top_p=0.9)
    assert (law[np.arange(len(text)), text] > 0).all()
    assert tokens_of(pair, draft_model=small, top_k=1) == tokens_of(pair, temperature=0.0)


# A draft model that is broken


class Broken(nn.Module):
    """A model whose logits are no numbers from its n-th call on."""

    def __init__(self, model: nn.Module, calls: int, wrong: float):
        super().__init__()
        self.inner, self.left, self.wrong = model, [calls], wrong
        self.layers = model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(inputs, cache=cache)
        self.left[0] -= 1
        return logits if self.left[0] >= 0 else logits + self.wrong


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("calls", [0, 2, 7])
def test_drafts_of_no_numbers_are_rejected(
    pair: tuple[Any, Any], small: nn.Module, calls: int, wrong: float
) -> None:
    """Only one token can be drawn, so the text is the greedy one; chains may be sound at first."""
    model = tiny_model("llama")
    options = {"max_tokens": 12, "top_k": 1, "draft_verification": "block"}
    plain = tokens_of((model, pair[1]), [5, 6], temperature=0.0, max_tokens=12)
    broken = Broken(tiny_model("llama"), calls, wrong)
    assert tokens_of((model, pair[1]), [5, 6], draft_model=broken, **options) == plain


def test_behind_a_law_of_no_numbers_the_targets_is_drawn_from() -> None:
    """It is as if the chain had ended before."""
    noise = np.random.default_rng(3)
    p, q = (mx.softmax(mx.array(noise.normal(size=(n, 8))), axis=-1) for n in (4, 3))
    tokens, bad = mx.array([2, 5, 1]), mx.array([[False], [True], [False]])
    accepts, rests = block_verification.acceptance(p, mx.where(bad, mx.nan, q), tokens)
    short, short_rests = block_verification.acceptance(p[:2], q[:1], tokens[:1])
    np.testing.assert_allclose(accepts, [short[0], 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rests[0], short_rests[0], rtol=1e-6)
    share = rests[1] / rests[1].sum()  # one more token could have been accepted, and none was
    np.testing.assert_allclose(share, p[1], rtol=1e-5)
