"""Beam search against a twin that scores every candidate from the beginning of its path."""

from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from oracles.beam_search import Path, slow_beam_search
from oracles.recurrent_drafter import slow_logits
from oracles.sampling import softmax

from mlx_distill.core.beam_search import Listed, beam_search
from mlx_distill.core.beam_searches import top_values
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.recurrent import (
    SHARPNESS,
    RecurrentDrafter,
    RecurrentDrafterConfig,
)

ROOT = 3
TRIMMED = [1, 4, 5, 8]
SHAPES = [(1, 1), (1, 5), (2, 4), (3, 3), (4, 6), (8, 2)]


class TinyDrafter:
    """A random recurrent drafter over nine tokens, and the same in float64.

    Args:
        seed: Of the weights.
        token_ids: The tokens that can be drafted; None for all.
        rnn: Whether the state is a recurrence.
    """

    def __init__(self, seed: int, token_ids: list[int] | None = None, rnn: bool = True):
        random = np.random.default_rng(seed)
        self.config = RecurrentDrafterConfig(
            hidden_size=6,
            vocab_size=9,
            exit_dim=8,
            num_draft_layers=1,
            rnn=rnn,
            draft_vocab_size=token_ids and len(token_ids),
        )
        self.network = RecurrentDrafter(self.config)
        self.parameters = {
            name: 0.7 * random.normal(size=value.shape).astype(np.float32)
            for name, value in tree_flatten(self.network.parameters())
        }
        if token_ids:
            self.parameters["token_ids"] = np.array(token_ids)
        weights = [(name, mx.array(value)) for name, value in self.parameters.items()]
        self.network.load_weights(weights)
        self.embed = nn.Embedding(9, 6)
        self.embed.weight = mx.array(random.normal(size=(9, 6)).astype(np.float32))
        self.hidden = random.normal(size=6).astype(np.float32)
        self.token_ids = token_ids

    def step(self, tokens: mx.array, state: mx.array | None) -> tuple[mx.array, mx.array]:
        state = self.network.advance(state, self.network.read(self.embed(tokens)))
        context = self.network.context(mx.array(self.hidden))[None]
        logits = self.network.logits(context, state)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True), state

    def search(self, width: int, length: int) -> Draft:
        token_ids = None if self.token_ids is None else mx.array(self.token_ids)
        return beam_search(self.step, mx.array([ROOT]), None, width, length, token_ids, 2**16)

    def logits(self, path: Path) -> np.ndarray:
        """Return the float64 logits after the root and a path, from scratch."""
        read = np.array(self.embed.weight)[[ROOT, *path]]
        return slow_logits(self.parameters, self.hidden, read, self.config.rnn)

    def log_probs(self, path: Path) -> np.ndarray:
        return np.log(softmax(self.logits(path)))

    def slow_search(self, width: int, length: int) -> list[dict[Path, float]]:
        return slow_beam_search(self.log_probs, width, length, self.token_ids)

    def slow_draft(
        self, width: int, length: int, noise: np.ndarray | None = None
    ) -> list[dict[Path, float]]:
        """Return what a drafter searches for: the best of logits and noise, sharpened."""

        def scores(path: Path) -> np.ndarray:
            logits = self.logits(path)
            if noise is not None:
                columns = slice(None) if self.token_ids is None else self.token_ids
                logits = logits + noise[len(path), columns]
            return np.log(softmax(SHARPNESS * logits))

        return slow_beam_search(scores, width, length, self.token_ids)


def paths_by_level(draft: Draft) -> list[dict[Path, float]]:
    """Return the paths that end at each depth, the root left out, and their scores."""
    tokens, parents, depths = (
        np.array(x).tolist() for x in (draft.tokens, draft.parents, draft.depths)
    )
    assert (tokens[0], parents[0], depths[0], draft.scores[0].item()) == (ROOT, 0, 0, 0)
    paths: list[Path] = [()]
    result: list[dict[Path, float]] = [{} for _ in range(draft.max_depth)]
    for node in range(1, len(tokens)):
        assert parents[node] < node
        assert depths[node] == depths[parents[node]] + 1
        paths.append((*paths[parents[node]], tokens[node]))
        assert paths[-1] not in result[depths[node] - 1], "a path was found twice"
        result[depths[node] - 1][paths[-1]] = draft.scores[node].item()
    return result


def assert_equal_levels(draft: Draft, expected: list[dict[Path, float]]):
    for found, wanted in zip(paths_by_level(draft), expected, strict=True):
        assert found.keys() == wanted.keys()
        for path, score in wanted.items():
            assert found[path] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "length"), SHAPES)
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_the_search_equals_the_slow_twin(
    width: int, length: int, token_ids: list[int] | None, seed: int
):
    drafter = TinyDrafter(seed, token_ids)
    assert_equal_levels(drafter.search(width, length), drafter.slow_search(width, length))


@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_tokens_may_be_listed(token_ids: list[int] | None):
    """In another order for every beam; what is not listed is never drafted."""
    drafter, random = TinyDrafter(2, token_ids), np.random.default_rng(1)

    def step(tokens: mx.array, state: Any) -> tuple[Listed, mx.array]:
        logits, state = drafter.step(tokens, state)
        columns = mx.array(random.permuted([range(logits.shape[1])] * len(logits), axis=1))
        tokens = columns if token_ids is None else mx.array(token_ids)[columns]
        return Listed(mx.take_along_axis(logits, columns, axis=1), tokens), state

    draft = beam_search(step, mx.array([ROOT]), None, 3, 3)
    assert_equal_levels(draft, drafter.slow_search(3, 3))


@pytest.mark.parametrize("first", [2**16 - 4, 2**20 - 4, 2**23])
def test_tokens_of_wide_vocabularies_are_whole(first: int) -> None:
    random, ids = np.random.default_rng(2), first + mx.arange(8)
    table = mx.array(random.normal(size=(3, 8)).astype(np.float32))

    def step(tokens: mx.array, state: Any) -> tuple[mx.array, Any]:
        return table[: tokens.size], state

    wide = beam_search(step, mx.array([ROOT]), (), 3, 3, ids, first + 8)
    plain = beam_search(step, mx.array([ROOT]), (), 3, 3)
    fields = [
        [np.array(x)[1:].tolist() for x in (y.tokens, y.depths, y.scores)] for y in (wide, plain)
    ]
    paths = [sorted(zip(*one, strict=True)) for one in fields]
    assert paths[0] == [(token + first, *others) for token, *others in paths[1]]


@pytest.mark.parametrize("width", [9, 10, 100])
def test_a_width_beyond_the_vocabulary_is_capped(width: int):
    drafter = TinyDrafter(0)
    draft = drafter.search(width, 3)
    assert draft.tokens.shape == (1 + 3 * 9,)
    assert_equal_levels(draft, drafter.slow_search(9, 3))


def test_a_full_width_finds_the_best_of_all_pairs():
    drafter = TinyDrafter(1)
    pairs = {
        (first, second): drafter.log_probs(())[first] + drafter.log_probs((first,))[second]
        for first, second in product(range(9), repeat=2)
    }
    best = sorted(pairs, key=lambda pair: -pairs[pair])[:9]
    assert paths_by_level(drafter.search(9, 2))[1].keys() == set(best)


def test_width_one_takes_the_best_token_each_time():
    drafter = TinyDrafter(2)
    path: Path = ()
    for _ in range(6):
        path += (int(drafter.log_probs(path).argmax()),)
    assert drafter.search(1, 6).tokens.tolist() == [ROOT, *path]


def test_a_drafter_of_one_token_repeats_it():
    drafter = TinyDrafter(3, token_ids=[7])
    draft = drafter.search(4, 3)
    assert draft.tokens.tolist() == [ROOT, 7, 7, 7]
    assert draft.parents.tolist() == [0, 0, 1, 2]
    assert np.abs(np.array(draft.scores)).max() == 0


@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_no_path_is_more_probable_than_its_parents(token_ids: list[int] | None):
    draft = TinyDrafter(4, token_ids).search(4, 6)
    assert mx.all(draft.scores <= draft.scores[draft.parents]).item()


def remembering_step(vocab_size: int) -> Callable[[mx.array, Any], tuple[mx.array, Any]]:
    """Return a step whose state holds all tokens read, in two arrays and a dictionary."""

    def step(tokens: mx.array, state: Any) -> tuple[mx.array, Any]:
        path, (count,) = state["path"], state["counts"]
        path = mx.concatenate([path[:, 1:], tokens[:, None]], axis=1)
        rows = [random_row(vocab_size, [t for t in row if t >= 0]) for row in path.tolist()]
        return mx.array(np.log(rows).astype(np.float32)), {"path": path, "counts": (count + 1,)}

    return step


def random_row(vocab_size: int, read: list[int]) -> np.ndarray:
    """Return a distribution that belongs to the tokens read so far."""
    return softmax(np.random.default_rng(read).normal(size=vocab_size) * 2)


@pytest.mark.parametrize(("width", "length"), [(1, 4), (3, 5), (5, 4)])
def test_every_beam_keeps_its_own_state(width: int, length: int):
    # The state is exactly the path, so a beam that was given another's would score other tokens.
    state = {"path": mx.full((1, 6), -1, mx.int32), "counts": (mx.zeros((1,), mx.int32),)}
    draft = beam_search(remembering_step(5), mx.array([ROOT]), state, width, length)
    expected = slow_beam_search(lambda path: np.log(random_row(5, [ROOT, *path])), width, length)
    assert_equal_levels(draft, expected)


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_a_bound_drafter_searches_the_same(token_ids: list[int] | None, rnn: bool):
    drafter = TinyDrafter(5, token_ids, rnn)
    bound = BoundDrafter(drafter.network, drafter.embed, {})
    plan = DraftPlan(beam_width=3, draft_length=4)
    for _ in range(2):  # the second time the search is compiled already
        draft = bound.draft(mx.array(drafter.hidden), mx.array([ROOT]), plan)
        assert_equal_levels(draft, drafter.slow_draft(3, 4))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_a_bound_drafter_looks_at_the_noise(token_ids: list[int] | None, scale: float):
    drafter = TinyDrafter(5, token_ids)
    bound = BoundDrafter(drafter.network, drafter.embed, {})
    plan = DraftPlan(beam_width=3, draft_length=4)
    for seed in range(3):
        noise = scale * np.random.default_rng(seed).gumbel(size=(4, 9)).astype(np.float32)
        start = mx.array(drafter.hidden), mx.array([ROOT])
        draft = bound.draft(*start, plan, mx.array(noise))
        assert_equal_levels(draft, drafter.slow_draft(3, 4, noise))


def test_noise_without_end_ranks_behind_its_parent():
    """Gumbel noise can be -inf; the tree is one all the same."""
    drafter = TinyDrafter(5)
    bound = BoundDrafter(drafter.network, drafter.embed, {})
    noise = mx.where(mx.arange(9) < 3, 0, -mx.inf) + mx.zeros((4, 1))
    draft = bound.draft(mx.array(drafter.hidden), mx.array([ROOT]), DraftPlan(4, 4), noise)
    assert mx.isfinite(draft.scores).all().item()
    for num_nodes in range(2, 13):
        tree = draft.best_first(num_nodes)
        paths = [tuple(tree.tokens[mx.array(path)].tolist()) for path in tree.paths()]
        assert len(set(paths)) == num_nodes
        assert {path[:-1] for path in paths[1:]} <= set(paths)


def test_a_bound_drafter_needs_no_table(monkeypatch: pytest.MonkeyPatch):
    drafter = TinyDrafter(6)
    monkeypatch.setattr("mlx_distill.drafters.bound.TABLE_BYTES", 0)
    bound = BoundDrafter(drafter.network, drafter.embed, {})
    draft = bound.draft(mx.array(drafter.hidden), mx.array([ROOT]), DraftPlan(2, 3))
    assert_equal_levels(draft, drafter.slow_draft(2, 3))


@pytest.mark.parametrize("width", [5, 128, 1000, 1024, 128 * 300])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_top_values_are_the_largest(width: int, count: int):
    values = mx.random.normal((3, width), key=mx.random.key(width))
    places, found = top_values(values, count)
    assert found.tolist() == np.take_along_axis(np.array(values), np.array(places), 1).tolist()
    expected = np.sort(np.array(values), axis=1)[:, width - count :]
    assert np.sort(np.array(found), axis=1).tolist() == expected.tolist()
