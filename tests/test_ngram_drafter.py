"""The n-gram drafter: what it drafts, and that texts with it are those without."""

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

import mlx_distill
from mlx_distill import DraftPlan, InputError, NGramDrafter
from mlx_distill.drafters.protocol import Drafter, DraftState, Features

NOTHING = Features(mx.zeros((1, 4)))
STORY = "Tom had a red ball. Tom had a blue ball. Tom had a"
PLAN = DraftPlan(draft_length=4)


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


def drafted(tokens: list[int], root: int, length: int = 4, **sizes: int) -> list[int]:
    """Return what follows a root; an empty list if nothing is drafted."""
    state = NGramDrafter(**sizes).open(mx.array(tokens), NOTHING)
    draft = state.draft(mx.array([root]), DraftPlan(draft_length=length), None)
    if draft is None:
        return []
    assert draft.tokens[0].item() == root
    assert draft.beams() == [draft.tokens.tolist()]
    return draft.tokens.tolist()[1:]


def test_it_is_a_drafter() -> None:
    assert isinstance(NGramDrafter(), Drafter)
    assert isinstance(NGramDrafter().open(mx.array([1]), NOTHING), DraftState)


@pytest.mark.parametrize(
    ("tokens", "root", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1], 2, [3, 4, 5, 6]),
        ([1, 2, 3, 1, 2, 4, 1], 2, [4, 1, 2]),  # the last place, up to the text's end
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1], 2, [3, 8, 1, 2]),  # but a longer match before it
        ([1, 2, 3], 2, []),  # one token alone is not looked for
        ([5], 5, []),
        ([5, 5], 5, [5]),
    ],
)
def test_what_followed_is_drafted(tokens: list[int], root: int, expected: list[int]) -> None:
    assert drafted(tokens, root) == expected


def test_the_plan_says_how_long() -> None:
    assert drafted([1, 2, 3, 4, 5, 6, 1], 2, length=2) == [3, 4]
    assert drafted([1, 3, 4], 1, shortest=1) == [3, 4, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_rewound_text_is_as_if_it_had_never_been_longer(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 3, 60).tolist()
    state = NGramDrafter(longest=3).open(mx.array(tokens[:20]), NOTHING)
    state.accept(mx.array([*tokens[20:40], -1, -1]), NOTHING)  # as the loop pads a path
    state.rewind(25)
    state.accept(mx.array(tokens[15:30]), NOTHING)
    other = NGramDrafter(longest=3).open(mx.array(tokens[:30]), NOTHING)
    for root in range(3):
        draft, wanted = (part.draft(mx.array([root]), PLAN, None) for part in (state, other))
        assert (draft is None) == (wanted is None)
        if draft is not None and wanted is not None:
            assert draft.tokens.tolist() == wanted.tokens.tolist()


@pytest.mark.parametrize("sizes", [(2, 3), (0, 0), (17, 2), (3, -1)])
def test_sizes_out_of_order_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="1 <= shortest <= longest <= 16"):
        NGramDrafter(*sizes)


# Whole texts


@pytest.mark.parametrize("plan", [DraftPlan(), DraftPlan(draft_length=7), DraftPlan(tree="beam")])
@pytest.mark.parametrize("prompt", [STORY, "Once upon a time"])
def test_greedy_texts_are_mlx_lms(pair: tuple[Any, Any], prompt: str, plan: DraftPlan) -> None:
    options: dict[str, Any] = {"max_tokens": 40}
    expected = [r.token for r in mlx_lm.stream_generate(*pair, prompt, **options)]
    options |= {"drafter": NGramDrafter(), "plan": plan}
    assert [r.token for r in mlx_distill.stream_generate(*pair, prompt, **options)] == expected


def test_texts_of_a_seed_are_those_without(pair: tuple[Any, Any]) -> None:
    for law in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}):
        options: dict[str, Any] = {"seed": 4, "max_tokens": 40, **law}
        plain = mlx_distill.generate(*pair, STORY, **options)
        assert mlx_distill.generate(*pair, STORY, drafter=NGramDrafter(), **options) == plain


def test_processors_walk_with_it(pair: tuple[Any, Any]) -> None:
    def text(drafter: Any) -> str:
        penalty = make_logits_processors(repetition_penalty=1.1)
        options: dict[str, Any] = {"logits_processors": penalty, "max_tokens": 40}
        return mlx_distill.generate(*pair, STORY, drafter=drafter, **options)

    assert text(NGramDrafter()) == text(None)


def test_a_text_that_repeats_takes_fewer_calls(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    sentence = tokenizer.encode("The cat and the dog ran to the park.", add_special_tokens=False)

    def again(tokens: mx.array, logits: mx.array) -> mx.array:
        """Let the text go on with the sentence, over and over."""
        right = sentence[(tokens.size - 1) % len(sentence)]
        return mx.where(mx.arange(logits.shape[-1]) == right, 100.0, logits)

    options: dict[str, Any] = {"max_tokens": 60, "logits_processors": [again]}
    prompt = [1, *sentence, *sentence]
    drafter = mlx_distill.load_drafter("ngram", model)
    *_, last = mlx_distill.stream_generate(model, tokenizer, prompt, drafter=drafter, **options)
    assert last.tokens_per_call > 4
    *_, last = mlx_distill.stream_generate(model, tokenizer, prompt, drafter=drafter, max_tokens=60)
    assert last.tokens_per_call > 1  # left to itself the model moves on
