"""The n-gram drafter: what it drafts, and that texts with it are those without."""

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from half_models import REFERENCE
from mlx_lm.sample_utils import make_logits_processors

import mlx_distill
from mlx_distill import DraftPlan, InputError, MixedDrafter, NGramDrafter
from mlx_distill.drafters import ngram
from mlx_distill.drafters.hit_rates import HitRates
from mlx_distill.drafters.lookup import Store, Text
from mlx_distill.drafters.protocol import Closes, Drafter, DraftState, Features
from mlx_distill.speculation import drafted_text, parked

NOTHING = Features(mx.zeros((1, 4)))
STORY = "Tom had a red ball. Tom had a blue ball. Tom had a"
PLAN = DraftPlan(draft_length=4)


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


def drafted(tokens: list[int], root: int, length: int = 4, **sizes: int) -> list[list[int]]:
    """Return the paths that follow a root, the likeliest first; none if nothing is drafted."""
    state = NGramDrafter(**{"shortest": 2, **sizes}).open(mx.array(tokens), NOTHING)
    draft = state.draft(mx.array([root]), DraftPlan(draft_length=length), None)
    if draft is None:
        return []
    assert draft.tokens[0].item() == root
    return [beam[1:] for beam in draft.beams()]


def test_it_is_a_drafter() -> None:
    assert isinstance(NGramDrafter(), Drafter)
    state = NGramDrafter().open(mx.array([1]), NOTHING)
    assert isinstance(state, DraftState)
    assert isinstance(state, Closes)


@pytest.mark.parametrize(
    ("tokens", "root", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1], 2, [3, 4, 5, 6]),
        ([1, 2, 3, 1, 2, 4, 1], 2, [4, 1, 2, 4]),  # the last place, and on as if it repeated
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1], 2, [3, 8, 1, 2]),  # but a longer match before it
        ([1, 2, 3], 2, None),  # one token alone is not looked for
        ([5], 5, None),
        ([5, 5], 5, [5, 5, 5, 5]),
        ([1, 2, 3, 1, 2, 3, 1], 2, [3, 1, 2, 3]),
    ],
)
def test_what_followed_is_drafted(tokens: list[int], root: int, expected: list[int] | None) -> None:
    assert drafted(tokens, root)[:1] == ([expected] if expected else [])


def test_the_plan_says_how_long() -> None:
    assert drafted([1, 2, 3, 4, 5, 6, 1], 2, length=2) == [[3, 4]]


def test_other_continuations_are_branches() -> None:
    text = [7, 1, 2, 3, 4, 8, 1, 2, 3, 5, 7, 1, 2]
    state = NGramDrafter(shortest=2).open(mx.array(text), NOTHING)
    draft = state.draft(mx.array([3]), DraftPlan(draft_length=1), None)
    assert draft is not None
    assert draft.tokens.tolist() == [3, 4, 5]  # the one whose match is longer is likelier
    assert draft.parents.tolist() == [0, 0, 0]
    shares = mx.exp(draft.scores).tolist()
    assert 1 > shares[1] > shares[2] > 0


def test_scores_follow_what_matches_come_to() -> None:
    """Matches that are always right are nearly sure; where they never are, there is no draft."""
    right, wrong = (NGramDrafter(shortest=2).open(mx.array([1]), NOTHING) for _ in range(2))
    for number in range(100):
        right.accept(mx.array([2, 3, 1]), NOTHING)
        wrong.accept(mx.array([2, 100 + number, 1]), NOTHING)
    root, plan = mx.array([2]), DraftPlan(draft_length=1)
    draft = right.draft(root, plan, None)
    assert draft is not None
    assert draft.tokens.tolist() == [2, 3]
    assert 0.95 < mx.exp(draft.scores[1]).item() < 1
    assert wrong.draft(root, plan, None) is None


def test_rates_are_shares_of_the_latest_places() -> None:
    rates = HitRates(4)
    for number in range(400):
        rates.learn(True, 0, 9, number % 4 > 0)
    assert rates.rate(True, 0, 4) == rates.rate(True, 0, 12) == pytest.approx(0.75, abs=0.05)
    assert rates.rate(True, 0, 3) == rates.rate(False, 0, 3) == 0.6  # of others nothing is known
    assert rates.copy().rate(True, 0, 4) == rates.rate(True, 0, 4)
    for _ in range(100):
        rates.learn(True, 0, 4, False)
    assert rates.rate(True, 0, 4) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_a_rewound_text_is_as_if_it_had_never_been_longer(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 3, 60).tolist()
    state = NGramDrafter(3, 2).open(mx.array(tokens[:20]), NOTHING)
    state.accept(mx.array([*tokens[20:40], -1, -1]), NOTHING)  # as the loop pads a path
    state.rewind(25)
    state.accept(mx.array(tokens[15:30]), NOTHING)
    other = NGramDrafter(3, 2).open(mx.array(tokens[:30]), NOTHING)
    other.rates = state.rates
    for root in range(3):
        draft, wanted = (part.draft(mx.array([root]), PLAN, None) for part in (state, other))
        assert (draft is None) == (wanted is None)
        if draft is not None and wanted is not None:
            assert draft.tokens.tolist() == wanted.tokens.tolist()
            assert draft.scores.tolist() == wanted.scores.tolist()


def test_nothing_is_waited_for_where_nothing_can_match(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[mx.array] = []
    monkeypatch.setattr(ngram, "to_host", lambda x: looked_at.append(x) or x.tolist())
    state = NGramDrafter().open(mx.array([1, 2, 3, 4, 5, 1, 9]), NOTHING)
    root = mx.array([3])

    def waited() -> bool:
        state.draft(root, PLAN, None)
        return any(one is root for one in looked_at)

    assert not waited()
    state.accept(mx.array([1]), NOTHING)
    assert not waited()
    state.accept(mx.array([2]), NOTHING)  # from here on, a 3 would match
    assert waited()
    draft = state.draft(root, PLAN, None)
    assert draft is not None
    assert draft.tokens.tolist()[:3] == [3, 4, 5]


# The store


def seen_in(drafter: NGramDrafter, tokens: list[int], answer: list[int]) -> None:
    """Let a drafter see a whole text."""
    state = drafter.open(mx.array(tokens), NOTHING)
    state.accept(mx.array(answer), NOTHING)
    state.close()


def following(drafter: NGramDrafter, tokens: list[int]) -> list[int]:
    state = drafter.open(mx.array(tokens[:-1]), NOTHING)
    draft = state.draft(mx.array(tokens[-1:]), PLAN, None)
    return [] if draft is None else draft.tokens.tolist()[1:]


def test_earlier_texts_are_looked_at_unless_switched_off() -> None:
    for size, expected in ((100, [4, 5, 6]), (0, [])):
        drafter = NGramDrafter(store_tokens=size)
        seen_in(drafter, [1, 2, 3], [4, 5, 6])
        assert following(drafter, [8, 1, 2, 3]) == expected
        assert len(drafter.store) == (6 if size else 0)


def test_the_own_text_comes_before_the_store() -> None:
    drafter = NGramDrafter()
    seen_in(drafter, [1, 2, 3], [4, 5, 6])
    assert following(drafter, [1, 2, 3, 7, 8, 9, 5, 1, 2, 3])[:1] == [7]


def test_a_text_that_goes_on_leaves_nothing() -> None:
    drafter = NGramDrafter()
    state = drafter.open(mx.array([1, 2, 3, 4, 5]), NOTHING)
    state.accept(mx.array([6]), NOTHING)
    assert following(drafter, [8, 1, 2, 3]) == []


def test_the_store_keeps_the_latest_texts_within_its_bound() -> None:
    drafter = NGramDrafter(store_tokens=50)
    for start in range(100, 2000, 10):
        seen_in(drafter, list(range(start, start + 9)), [1])
        assert len(drafter.store) <= 50
    assert following(drafter, [1990, 1991, 1992])[:2] == [1993, 1994]
    assert following(drafter, [1900, 1901, 1902]) == []
    seen_in(drafter, list(range(3000)), [1])  # of a text that is too long, the end
    assert len(drafter.store) == 50
    assert following(drafter, [2990, 2991, 2992])[:2] == [2993, 2994]
    assert following(drafter, [90, 91, 92]) == []
    for start in range(200):  # and never more than some texts
        seen_in(drafter, [start, start, start], [1])
    assert len(drafter.store.texts) <= 64


@pytest.mark.parametrize("sizes", [(2, 3), (0, 0), (65, 2), (3, -1), (4, 1)])
def test_sizes_out_of_order_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="2 <= shortest <= longest <= 64"):
        NGramDrafter(*sizes)


# Whole texts, of n-grams alone and beside another drafter


@pytest.fixture(scope="module")
def drafters(pair: tuple[Any, Any]) -> dict[str, Drafter]:
    other = mlx_distill.load_drafter(REFERENCE, *pair)
    return {"ngram": NGramDrafter(), "mixed": MixedDrafter(other), "other": other}


@pytest.fixture(scope="module")
def plain_answer(pair: tuple[Any, Any]) -> list[int]:
    return [r.token for r in mlx_lm.stream_generate(*pair, STORY, max_tokens=40)]


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize(
    "plan", [DraftPlan(), DraftPlan(1, 7, 20), DraftPlan(tree="beam")], ids=str
)
@pytest.mark.parametrize("kind", ["ngram", "mixed"])
def test_greedy_texts_are_mlx_lms(
    pair: tuple[Any, Any],
    plain_answer: list[int],
    drafters: dict[str, Drafter],
    kind: str,
    plan: DraftPlan,
) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "drafter": drafters[kind], "plan": plan}
    found = mlx_distill.stream_generate(*pair, STORY, **options)
    assert [one.token for one in found] == plain_answer


@pytest.mark.parametrize("kind", ["ngram", "mixed"])
def test_texts_of_a_seed_are_those_without(
    pair: tuple[Any, Any], drafters: dict[str, Drafter], kind: str
) -> None:
    """The second time, the store has the whole text, and the calls are few."""
    for law in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}):
        options: dict[str, Any] = {"seed": 4, "max_tokens": 28, **law}
        plain = mlx_distill.generate(*pair, STORY, **options)
        options |= {"drafter": drafters[kind], "plan": DraftPlan()}
        calls = []
        for _ in range(2):
            found = list(mlx_distill.stream_generate(*pair, STORY, **options))
            assert "".join(one.text for one in found) == plain
            calls.append(found[-1].target_calls)
        assert calls[1] < calls[0]


def test_processors_walk_with_it(pair: tuple[Any, Any], drafters: dict[str, Drafter]) -> None:
    def text(drafter: Any) -> str:
        penalty = make_logits_processors(repetition_penalty=1.1)
        options: dict[str, Any] = {"logits_processors": penalty, "max_tokens": 40}
        return mlx_distill.generate(*pair, STORY, drafter=drafter, plan=DraftPlan(), **options)

    assert text(drafters["ngram"]) == text(drafters["mixed"]) == text(None)


@pytest.mark.parametrize("kind", ["ngram", "mixed"])
def test_a_text_that_repeats_takes_fewer_calls(
    pair: tuple[Any, Any], drafters: dict[str, Drafter], kind: str
) -> None:
    tokenizer = pair[1]
    text = "Mog and Zub ate 73 green frogs at the old mill of Gromp."
    sentence = tokenizer.encode(text, add_special_tokens=False)

    def again(tokens: mx.array, logits: mx.array) -> mx.array:
        """Let the text go on with the sentence, over and over."""
        right = sentence[(tokens.size - 1) % len(sentence)]
        return mx.where(mx.arange(logits.shape[-1]) == right, 100.0, logits)

    options: dict[str, Any] = {"max_tokens": 60, "logits_processors": [again], "plan": DraftPlan()}
    prompt = [1, *sentence, *sentence]
    *_, last = mlx_distill.stream_generate(*pair, prompt, drafter=drafters[kind], **options)
    assert last.tokens_per_call > 4
    *_, other = mlx_distill.stream_generate(*pair, prompt, drafter=drafters["other"], **options)
    assert last.tokens_per_call > other.tokens_per_call + 1


def test_its_name_is_a_drafter(pair: tuple[Any, Any]) -> None:
    """By name, alone or in front of a folder; then no text is stored."""
    alone = mlx_distill.load_drafter("ngram", pair[0])
    both = mlx_distill.load_drafter(f"ngram+{REFERENCE}", *pair)
    assert isinstance(alone, NGramDrafter)
    assert isinstance(both, MixedDrafter)
    assert alone.store.num_tokens == both.ngrams.store.num_tokens == 0


def test_a_step_for_which_nothing_is_found_is_a_plain_one(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all threads, which are taken from it only where there is something to verify."""
    noted: list[bool] = []
    for module in (drafted_text, parked):
        monkeypatch.setattr(module, "let_draft", noted.append)
    answer = mlx_distill.stream_generate(
        *pair, [5, 9, 13], drafter=NGramDrafter(longest=64, shortest=64), plan=PLAN, max_tokens=6
    )
    assert not list(answer)[-1].drafted_tokens
    assert noted[:2] == [True, False]
    assert len(noted) > 4
    assert not any(noted[2:])


@pytest.mark.parametrize(
    ("prompt", "law", "most"),
    [
        ([5, 9, 13], {"temperature": 1.5}, 5),  # hardly two tokens follow each other twice
        (STORY, {"temperature": 1.0}, 20),
        (STORY, {}, 40),
    ],
    ids=["new", "drawn", "greedy"],
)
def test_while_nothing_can_match_it_is_not_asked(
    pair: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    prompt: Any,
    law: dict[str, float],
    most: int,
) -> None:
    """The text is the same, in as many calls as if it were asked at every token."""
    times: list[int] = []
    draft = ngram.NGramState.draft

    def counted(state: Any, *given: Any) -> Any:
        times[-1] += 1
        return draft(state, *given)

    monkeypatch.setattr(ngram.NGramState, "draft", counted)
    found = []
    for listens in (True, False):
        if not listens:
            monkeypatch.setattr(parked, "_listener", lambda decoding: None)
        times.append(0)
        options: dict[str, Any] = {"max_tokens": 60, "seed": 3, "plan": PLAN, **law}
        answer = mlx_distill.stream_generate(*pair, prompt, drafter=NGramDrafter(), **options)
        *tokens, last = [(one.token, one.target_calls) for one in answer]
        found.append(([token for token, _ in tokens], last))
    assert found[0] == found[1]
    assert times[0] <= most
    assert times[0] < times[1]


def test_a_store_is_looked_at_while_another_threads_text_ends() -> None:
    store = Store(100)
    for last in (4, 5):
        store.add(Text([1, 2, 3, last]))
    having = store.having(Text([1, 2]))
    found = [next(having)]
    store.add(Text([1, 2, 3, 6]))
    found += having
    assert [text.tokens[-1] for text in found] == [5, 4]
