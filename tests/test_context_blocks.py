"""Context blocks against a float64 twin, and a text's state against a state of the whole text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import with_eos
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from scipy.special import expit, softmax
from test_taps import EverySecond
from tiny_models import tiny_model

import mlx_distill
from mlx_distill.checkpoint import bundled
from mlx_distill.core.draft import Draft
from mlx_distill.core.verification import Walk
from mlx_distill.drafters.attending import ContextReader
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.context_blocks import ContextBlocks
from mlx_distill.drafters.protocol import DraftPlan, DraftState, Features
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.target.target import Target

PLAN = DraftPlan(11, 1)  # every token, with its score
WIDTH, EMBEDDING, WINDOW = 12, 7, 4


def randomised(network: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Give all parameters random values."""
    random = np.random.default_rng(seed)
    weights = [
        (name, mx.array((scale * random.normal(size=value.shape)).astype(np.float32)))
        for name, value in tree_flatten(network.trainable_parameters())
    ]
    network.load_weights(weights, strict=False)


def random_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a target computed at some tokens, and embeddings of those that follow."""
    random = np.random.default_rng(3)
    hidden, following = (random.normal(size=(count, size)) for size in (WIDTH, EMBEDDING))
    return hidden.astype(np.float32), following.astype(np.float32)


# The formulas


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)


def rotated(x: np.ndarray, place: int) -> np.ndarray:
    """Return a head of 64 numbers, turned by its place."""
    angles = place * 10_000.0 ** (-np.arange(32) / 32)
    a, b = x[:32], x[32:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)]
    )


def slow_contexts(
    blocks: ContextBlocks, hidden: np.ndarray, following: np.ndarray, num_heads: int
) -> np.ndarray:
    """Return the contexts of one text, a token and a head at a time."""
    p = {name: np.array(value, np.float64) for name, value in tree_flatten(blocks.parameters())}
    joined = np.concatenate([norm(hidden.astype(np.float64)), norm(following)], axis=-1)
    begin = x = joined @ p["read.weight"].T
    for number in range(len(blocks.layers)):
        q, k, v = np.split(norm(x) @ p[f"layers.{number}.qkv.weight"].T, 3, axis=-1)
        attended = np.zeros((len(x), 64 * num_heads))
        for place in range(len(x)):
            seen = range(max(0, place - WINDOW + 1), place + 1)
            for head in range(num_heads):
                part = slice(64 * head, 64 * head + 64)
                query = rotated(q[place, part], place)
                scores = softmax([query @ rotated(k[one, part], one) / 8 for one in seen])
                attended[place, part] = sum(
                    score * v[one, part] for score, one in zip(scores, seen, strict=True)
                )
        x = x + attended @ p[f"layers.{number}.out.weight"].T
        gate, up = np.split(norm(x) @ p[f"layers.{number}.gate_up.weight"].T, 2, axis=-1)
        x = x + (gate * expit(gate) * up) @ p[f"layers.{number}.down.weight"].T
    return hidden + x - begin


def random_blocks(num_blocks: int, num_heads: int = 2) -> ContextBlocks:
    blocks = ContextBlocks(WIDTH, EMBEDDING, num_blocks, num_heads, WINDOW)
    randomised(blocks)
    return blocks


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_blocks_equal_their_formulas(num_blocks: int) -> None:
    """Two texts, and rows behind them that are none's."""
    blocks, (hidden, following) = random_blocks(num_blocks), random_rows(16)
    behind = [*range(9), *range(5), 0, 0]
    found = blocks(mx.array(hidden), mx.array(following), mx.array(behind))
    for text in (slice(0, 9), slice(9, 14)):
        expected = slow_contexts(blocks, hidden[text], following[text], 2)
        np.testing.assert_allclose(found[text], expected, rtol=1e-3, atol=1e-4)
    places = mx.array([12, 0, 3, 3])
    some = blocks(mx.array(hidden), mx.array(following), mx.array(behind), places)
    np.testing.assert_allclose(some, found[places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_going_on_equals_reading_the_whole(num_blocks: int) -> None:
    blocks, (hidden, following) = random_blocks(num_blocks), random_rows(13)
    expected = slow_contexts(blocks, hidden, following, 2)
    kept, first = blocks.nothing(mx.float32), 0
    for count, more in ((2, 0), (1, 2), (6, 3), (4, 0)):
        rows = np.arange(first, first + count)
        rows = mx.array(np.concatenate([rows, np.repeat(rows[:1], more)]))
        arrays = (mx.array(x)[rows] for x in (hidden, following))
        context, kept = blocks.go_on(kept, *arrays, mx.array(count))
        first += count
        np.testing.assert_allclose(context, expected[first - 1], rtol=1e-3, atol=1e-4)


def test_new_blocks_add_nothing_and_learn() -> None:
    blocks, (hidden, following) = ContextBlocks(WIDTH, EMBEDDING, 2, 1, WINDOW), random_rows(8)
    rows, behind = (mx.array(hidden), mx.array(following)), mx.arange(8)
    np.testing.assert_array_equal(blocks(*rows, behind), hidden)
    _, slopes = nn.value_and_grad(blocks, lambda: blocks(*rows, behind).square().sum())()
    moved = {name for name, slope in tree_flatten(slopes) if slope.any().item()}
    assert moved == {f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("out", "down")}


# The state of a text

TEXT = [5, 1, 8, 8, 3, 9, 2, 10, 7, 4, 1, 6, 0, 2]


class Known:
    """A random drafter and a text with random features."""

    def __init__(self, num_blocks: int, dtype: mx.Dtype = mx.float32, window: int = WINDOW):
        config = RecurrentDrafterConfig(
            hidden_size=WIDTH,
            vocab_size=11,
            exit_dim=9,
            num_draft_layers=1,
            embedding_size=EMBEDDING,
            cell="gru",
            context_state=True,
            taps=(0,),
            context_blocks=num_blocks,
            context_window=window,
        )
        network = RecurrentDrafter(config)
        randomised(network)
        network.set_dtype(dtype)
        embed = nn.Embedding(11, EMBEDDING)
        embed.set_dtype(dtype)
        self.drafter = BoundDrafter(network, embed, {})
        hidden = mx.array(random_rows(len(TEXT))[0]).astype(dtype)
        self.features = Features(hidden, None, (3 * hidden[::-1],))

    def opened(self, count: int) -> DraftState:
        """Return the state of a text whose first tokens are the prompt."""
        return self.drafter.open(mx.array(TEXT[:count]), self.features.rows(slice(count)))

    def accept(self, state: DraftState, first: int, count: int, more: int = 0) -> None:
        """Let a text go on, by a call of which ``more`` nodes were rejected."""
        rows = self.features.rows(slice(first, first + count))
        states, *taps = (
            mx.concatenate([x[:1]] + [mx.zeros_like(x[:1])] * more + [x[1:]])
            for x in (rows.states, *rows.taps)
        )
        tokens = mx.array(TEXT[first : first + count] + [-1] * more)
        accepted = mx.array([True] + [False] * more + [True] * (count - 1))
        last = mx.array(count + more - 1 if count > 1 else 0)
        walk = Walk(accepted, last, mx.array(0), count + more - 1)
        state.accept(tokens, Features(states, walk, tuple(taps)))

    def draft(self, state: DraftState, count: int) -> dict[tuple[int, ...], float]:
        """Return the paths that are drafted behind the text's token, and their scores."""
        draft = state.draft(mx.array(TEXT[count : count + 1]), PLAN, None)
        assert draft is not None
        return paths(draft)

    def fresh(self, count: int) -> dict[tuple[int, ...], float]:
        """Return what is drafted where the text is all prompt."""
        return self.draft(self.opened(count), count)


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    found = {0: (tokens[0],)}
    for node in range(1, len(tokens)):
        found[node] = (*found[parents[node]], tokens[node])
    scores = draft.scores.tolist()
    return {path: scores[node] for node, path in found.items()}


TYPES = [(mx.float32, 1e-4), (mx.bfloat16, 0.3), (mx.float16, 0.04)]


@pytest.mark.parametrize(("dtype", "error"), TYPES, ids=str)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_drafts_after_calls_equal_those_of_a_fresh_text(
    num_blocks: int, dtype: mx.Dtype, error: float
) -> None:
    """Calls that keep one token or more; and again where tokens are taken back."""
    known = Known(num_blocks, dtype, WINDOW if num_blocks == 1 else 16)
    state = known.opened(3)
    assert known.draft(state, 3) == pytest.approx(known.fresh(3), abs=error)
    for first, count, more in ((3, 2, 1), (5, 1, 2), (6, 3, 0)):
        known.accept(state, first, count, more)
        found = known.draft(state, first + count)
        assert found == pytest.approx(known.fresh(first + count), abs=error)
    for back, left in ((3, 6), (2, 4)):  # a whole call; one and a part of the one before
        state.rewind(back)
        assert known.draft(state, left) == pytest.approx(known.fresh(left), abs=error)
    known.accept(state, 4, 5, 1)
    assert known.draft(state, 9) == pytest.approx(known.fresh(9), abs=error)
    assert known.draft(state, 9) != pytest.approx(known.fresh(6), abs=error)


@pytest.mark.parametrize("drafts", [True, False])
def test_a_draft_that_is_made_in_vain_leaves_nothing(drafts: bool) -> None:
    """As when the draws are made again: the same call comes to another path and another root."""
    known = Known(1)
    state = known.opened(3)
    known.accept(state, 3, 4, 0)
    if drafts:
        state.draft(mx.array([0]), PLAN, None)
    state.rewind(4)
    known.accept(state, 3, 2, 2)
    assert known.draft(state, 5) == pytest.approx(known.fresh(5), abs=1e-4)


def test_a_parked_text_is_read_when_it_is_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_distill.drafters.attending.MOST_WAITING", 4)
    known = Known(1)
    state = known.opened(2)
    known.draft(state, 2)
    known.accept(state, 2, 2, 3)
    for place in range(4, 13):
        known.accept(state, place, 1)
    assert known.draft(state, 13) == pytest.approx(known.fresh(13), abs=1e-4)
    state.rewind(2)
    assert known.draft(state, 11) == pytest.approx(known.fresh(11), abs=1e-4)


def test_what_is_forgotten_beyond_the_last_calls_begins_anew() -> None:
    known = Known(1)
    state = known.opened(2)
    for place in range(2, 12):
        known.accept(state, place, 1)
    state.rewind(9)
    assert state.draft(mx.array([1]), PLAN, None) is None
    known.accept(state, 3, 4)
    assert known.draft(state, 7) == pytest.approx(known.fresh(7), abs=1e-4)


def test_a_compiled_reading_is_the_same() -> None:
    known = Known(2)
    plain, compiled = (
        ContextReader(known.drafter.network, known.drafter.embed, kind) for kind in (False, True)
    )
    found = []
    for reader in (plain, compiled):
        record = reader.nothing()
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            state = known.drafter.open(mx.array(TEXT[rows]), known.features.rows(rows))
            waiting = dataclasses.replace(record, waiting=state._record.waiting)  # pyright: ignore
            context, record = reader.read(waiting, mx.array(TEXT[rows.stop : rows.stop + 1]))
            found.append(np.array(context))
    np.testing.assert_allclose(found[3:], found[:3], rtol=1e-4, atol=1e-5)


# Whole texts


def with_blocks(drafter: BoundDrafter, num_blocks: int, window: int) -> BoundDrafter:
    """Return a drafter with blocks that do add something."""
    config = dataclasses.replace(
        drafter.config, context_blocks=num_blocks, context_window=window, context_heads=2
    )
    network = RecurrentDrafter(config)
    randomised(network.blocks, scale=0.05)
    network.update(drafter.network.parameters())
    mx.eval(network.parameters())
    return BoundDrafter(network, drafter.embed, drafter.target)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    tokenizer = mlx_lm.utils.load_tokenizer(bundled("stories-14m"))
    return tiny_model("llama"), with_eos(tokenizer, set())


def blocked(model: Any) -> BoundDrafter:
    """Return a drafter for a tiny model."""
    target = Target.of(model)
    assert target.embed is not None
    config = RecurrentDrafterConfig(
        target.hidden_size, target.vocab_size, 16, 1, taps=(1,), context_blocks=1, context_window=8
    )
    network = RecurrentDrafter(config)
    randomised(network)
    return BoundDrafter(network, target.embed, {})


PROMPT = [5, 17, 42, 8, 23, 61, 9, 30, 12, 77, 3, 14]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 3},
    "filters": {"temperature": 0.9, "seed": 3, "top_p": 0.8, "top_k": 5},
    "beams": {"plan": DraftPlan(2, 3, tree="beam")},
}


@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_text_does_not_depend_on_blocks(pair: tuple[Any, Any], way: str, parks: bool) -> None:
    options = {"max_tokens": 24, **WAYS[way]}
    if parks:
        options = {**options, "plan": EverySecond()}
    expected = mlx_distill.generate(*pair, PROMPT, **{**options, "plan": None})
    found = mlx_distill.generate(*pair, PROMPT, drafter=blocked(pair[0]), **options)
    assert found == expected


def tokens_of(responses: Iterator[Any]) -> list[int]:
    return [response.token for response in responses]


def test_a_prompt_cache_goes_on(pair: tuple[Any, Any]) -> None:
    drafter = blocked(pair[0])
    caches = {kind: make_prompt_cache(pair[0]) for kind in ("plain", "drafted")}
    for prompt in (PROMPT, [7, 8, 9]):
        found = [
            tokens_of(mlx_distill.stream_generate(*pair, prompt, max_tokens=9, **options))
            for options in (
                {"prompt_cache": caches["plain"]},
                {"prompt_cache": caches["drafted"], "drafter": drafter},
            )
        ]
        assert found[0] == found[1]
