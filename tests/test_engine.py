"""The engine: several texts in turn, planners that park, requests that end or are cancelled."""

import itertools
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from drafting import KnowingDrafter, with_eos
from half_models import REFERENCE
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import DraftPlan, InputError
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.protocol import Outcome
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request

PROMPTS = ("Once upon a time", "The old baker forgot", "Ben had a red kite.")


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


@pytest.fixture(scope="module")
def drafter(pair: tuple[Any, Any]) -> Any:
    return mlx_distill.load_drafter(REFERENCE, *pair)


def request(pair: tuple[Any, Any], prompt: str, **options: Any) -> Request:
    return Request(mx.array(pair[1].encode(prompt)), **options)


def drain(engine: Engine) -> dict[int, list[int]]:
    """Return the tokens of every text."""
    found: dict[int, list[int]] = {}
    while engine.busy:
        for one in engine.step():
            found.setdefault(one.request, []).append(one.response.token)
    return found


@pytest.mark.parametrize("drafting", [True, False])
def test_texts_in_turn_are_those_one_by_one(
    pair: tuple[Any, Any], drafter: Any, drafting: bool
) -> None:
    one = drafter if drafting else None
    engine = Engine(*pair, one)
    laws = (Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9))
    numbers = [
        engine.submit(request(pair, prompt, max_tokens=10 + place, sampling=law, seed=place))
        for place, (prompt, law) in enumerate(zip(PROMPTS, laws, strict=True))
    ]
    found = drain(engine)
    for place, (number, prompt, law) in enumerate(zip(numbers, PROMPTS, laws, strict=True)):
        options: dict[str, Any] = {"temperature": law.temperature, "top_p": law.top_p}
        alone = mlx_distill.stream_generate(
            *pair, prompt, drafter=one, max_tokens=10 + place, seed=place, **options
        )
        assert found[number] == [response.token for response in alone]


def test_a_text_may_join_and_leave(pair: tuple[Any, Any], drafter: Any) -> None:
    engine = Engine(*pair, drafter)
    caches = make_prompt_cache(pair[0])
    leaving = engine.submit(request(pair, PROMPTS[0], prompt_cache=caches))
    for _ in range(3):
        assert [one.request for one in engine.step()] == [leaving]
    joining = engine.submit(request(pair, PROMPTS[1], max_tokens=8))
    assert [one.request for one in engine.step()] == [leaving, joining]
    engine.cancel(leaving)
    engine.cancel(leaving)  # once more is nothing
    assert engine.texts == (joining,)
    assert {cache.offset for cache in caches} == {len(pair[1].encode(PROMPTS[0])) + 4}
    expected = [r.token for r in mlx_lm.stream_generate(*pair, PROMPTS[1], max_tokens=8)]
    assert drain(engine)[joining] == expected[1:]


@pytest.mark.parametrize("closes", [True, False])
def test_what_ends_hands_nothing_out_any_more(pair: tuple[Any, Any], closes: bool) -> None:
    """The first text's token was ready when the second one broke the step off."""
    engine, raises = Engine(*pair), [False]

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if raises[0]:
            raise KeyboardInterrupt
        return logits

    first = engine.submit(request(pair, PROMPTS[0], max_tokens=20))
    engine.submit(request(pair, PROMPTS[1], max_tokens=20, logits_processors=(broken,)))
    engine.step()
    raises[0] = True
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    if closes:
        engine.close()
    else:
        engine.cancel(first)
    assert not engine.busy
    assert engine.step() == []


def test_an_error_ends_its_own_text_only(pair: tuple[Any, Any], drafter: Any) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 8:
            raise ValueError("enough")
        return logits

    engine = Engine(*pair, drafter)
    good = engine.submit(request(pair, PROMPTS[0], max_tokens=12))
    bad = engine.submit(request(pair, PROMPTS[1], logits_processors=(fail,)))
    found, errors = [], 0
    while engine.busy:
        try:
            found += [one.response.token for one in engine.step() if one.request == good]
        except ValueError:
            errors += 1
            assert bad not in engine.texts
    assert errors == 1
    expected = mlx_lm.stream_generate(*pair, PROMPTS[0], max_tokens=12)
    assert found == [response.token for response in expected]


class Alternating:
    """Parks every second time, and changes the shape of the others."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome | None] = []
        self.plans: list[DraftPlan | None] = []
        self.texts: set[int] = set()

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        self.texts.add(text)
        self.outcomes.append(outcome)
        number = len(self.outcomes)
        plan = DraftPlan(3, 1 + number % 4, 6) if number % 2 else None
        self.plans.append(plan)
        return plan


@pytest.mark.parametrize("law", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_planner_shapes_every_draft_and_parks(
    pair: tuple[Any, Any], drafter: Any, law: dict[str, Any]
) -> None:
    planner = Alternating()
    options: dict[str, Any] = {"max_tokens": 30, **law}
    expected = mlx_distill.generate(*pair, PROMPTS[0], **options)
    options |= {"drafter": drafter, "plan": planner}
    responses = list(mlx_distill.stream_generate(*pair, PROMPTS[0], **options))
    assert "".join(response.text for response in responses) == expected
    outcomes = [outcome for outcome in planner.outcomes if outcome is not None]
    assert planner.outcomes[0] is None
    assert len(planner.texts) == 1
    parked = [outcome for outcome in outcomes if len(outcome.parents) == 1]
    assert len(parked) >= 3
    assert all(outcome.num_accepted == 0 for outcome in parked)
    drafted = [outcome for outcome in outcomes if len(outcome.parents) > 1]
    assert {len(outcome.parents) for outcome in drafted} <= {2, 3, 4, 5, 6}
    for before, after in itertools.pairwise(outcomes):
        if after is not before:
            grown = after.cached_tokens - before.cached_tokens
            assert grown == before.num_accepted + 1


def test_a_planner_that_always_parks_decodes_plainly(pair: tuple[Any, Any], drafter: Any) -> None:
    class Parked:
        def shape(self, text: int, outcome: Outcome | None) -> None:
            return None

    options: dict[str, Any] = {"drafter": drafter, "plan": Parked(), "max_tokens": 12}
    responses = list(mlx_distill.stream_generate(*pair, PROMPTS[0], **options))
    expected = mlx_lm.stream_generate(*pair, PROMPTS[0], max_tokens=12)
    assert [r.token for r in responses] == [r.token for r in expected]
    assert responses[-1].drafted_tokens == 0
    assert responses[-1].target_calls == responses[-1].verified_tokens == 11


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be between 0 and"),
        ({"stop": ("",)}, "a stop text must not be empty"),
    ],
)
def test_requests_out_of_range(pair: tuple[Any, Any], options: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        request(pair, PROMPTS[0], **options)


@pytest.mark.parametrize(
    ("token", "named"), [(4096, "4096"), (-1, "-1"), (2**31 - 1, "2147483647")]
)
def test_tokens_that_the_model_does_not_have(pair: tuple[Any, Any], token: int, named: str) -> None:
    """An embedding would read foreign memory."""
    with pytest.raises(InputError, match=f"the prompt holds the token {named}; the model has 4096"):
        mlx_distill.stream_generate(*pair, [1, token, 5])


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize("earlier", [0, 5])
def test_an_answer_ends_where_the_positions_end(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, drafting: bool, earlier: int
) -> None:
    """A model with a learned table of them; drafts do not reach beyond it either."""
    model, tokenizer = tiny_model("gpt2"), with_eos(pair[1], set())
    table = model.model.wpe
    limit, seen = table.weight.shape[0], []
    prompt = [5 + place % 60 for place in range(limit - 12)]
    drafter = KnowingDrafter(model, prompt[: 20 + earlier], 60) if drafting else None
    caches = make_prompt_cache(model)
    if earlier:
        mx.eval(model(mx.array([prompt[:earlier]]), cache=caches))
    lookup = type(table).__call__
    monkeypatch.setattr(
        type(table), "__call__", lambda self, x: seen.append((self, x)) or lookup(self, x)
    )
    options: dict[str, Any] = {"drafter": drafter, "prompt_cache": caches, "max_tokens": 100}
    found = list(mlx_distill.stream_generate(model, tokenizer, prompt[earlier:], **options))
    assert len(found) == 12
    assert found[-1].finish_reason == "length"
    assert {cache.offset for cache in caches} == {limit}
    assert max(x.max().item() for part, x in seen if part is table) == limit - 1
    with pytest.raises(InputError, match=f"no room for an answer: .* the model's {limit}"):
        mlx_distill.stream_generate(model, tokenizer, [5] * limit, drafter=drafter)


def test_texts_of_several_engines_have_numbers_of_their_own(pair: tuple[Any, Any]) -> None:
    """One planner serves them all, and learns from each what it asked of it."""
    engines = [Engine(*pair) for _ in range(3)]
    numbers = [engine.submit(Request(mx.array([5, 6]), 2)) for engine in engines for _ in range(2)]
    assert len(set(numbers)) == 6
