"""Drafts become trees of their most probable paths, or of their beams."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from test_prefix_tree import slow_mask

from mlx_distill.core.draft import Draft, KnownDraft
from mlx_distill.core.prefix_tree import PrefixTree

ROOT = mx.array([100])


def draft_of(tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> Draft:
    """Return the draft of beams, level by level, (L, W); parents are indices in the level above."""
    length, width = tokens.shape
    above = 1 + width * (np.arange(length)[:, None] - 1) + parents
    above[0] = 0
    return Draft(
        mx.array([100, *tokens.ravel().tolist()]),
        mx.array([0, *above.ravel().tolist()]),
        mx.array([0, *np.repeat(np.arange(1, length + 1), width).tolist()]),
        mx.array(np.array([0, *scores.ravel()], np.float32)),
        length,
    )


def random_draft(seed: int, length: int, width: int, sure: float = 0.0) -> Draft:
    """Return levels whose tokens are all different, so that a token names its path.

    Args:
        seed: Of the parents and the scores.
        length: Number of levels.
        width: Number of beams.
        sure: Share of the first children that are as probable as their parents.
    """
    random = np.random.default_rng(seed)
    parents = random.integers(0, width, (length, width))
    parents[0] = 0
    scores = -random.exponential(1.0, (length, width)) - 0.01
    for level in range(1, length):
        _, first_children = np.unique(parents[level], return_index=True)
        scores[level, first_children[random.random(first_children.size) < sure]] = 0
        scores[level] += scores[level - 1][parents[level]]
    return draft_of(np.arange(length * width).reshape(length, width), parents, scores)


def token_paths(tree: PrefixTree | Draft) -> list[tuple[int, ...]]:
    """Return the tokens from the root to each node."""
    tokens, paths = tree.tokens.tolist(), [(100,)]
    for node, parent in enumerate(tree.parents.tolist()[1:], start=1):
        paths.append((*paths[parent], tokens[node]))
    return paths


def slow_best_first(draft: Draft, num_nodes: int) -> set[tuple[int, ...]]:
    """Return the most probable token paths, the root's own among them; a parent wins a tie."""
    pool = [(-s, len(p), p) for s, p in zip(draft.scores.tolist(), token_paths(draft), strict=True)]
    return {path for _, _, path in sorted(pool)[:num_nodes]}


def assert_is_a_tree(tree: PrefixTree):
    """Check what every tree promises."""
    parents = tree.parents.tolist()
    assert parents[0] == 0
    assert all(parent < node for node, parent in enumerate(parents[1:], start=1))
    np.testing.assert_array_equal(np.array(tree.mask), slow_mask(parents))
    assert tree.depths.tolist() == [len(path) - 1 for path in tree.paths()]


@pytest.mark.parametrize("num_nodes", [2, 5, 8, 13, 20])
@pytest.mark.parametrize("seed", range(6))
def test_best_first_takes_the_most_probable_paths(seed: int, num_nodes: int):
    draft = random_draft(seed, length=5, width=4)
    tree = draft.best_first(num_nodes)
    assert_is_a_tree(tree)
    assert tree.tokens.size == num_nodes
    assert set(token_paths(tree)) == slow_best_first(draft, num_nodes)


@pytest.fixture
def unstable_sort(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let equal values come in the reverse of their order, as a sort on a GPU may."""
    stable = mx.argsort
    mx.disable_compile()
    monkeypatch.setattr(mx, "argsort", lambda x: x.size - 1 - stable(x[::-1]))
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("unstable_sort")
@pytest.mark.parametrize("num_nodes", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("seed", range(6))
def test_a_sure_token_never_comes_without_its_parent(seed: int, num_nodes: int):
    draft = random_draft(seed, length=6, width=3, sure=0.7)
    tree = draft.best_first(num_nodes)
    assert_is_a_tree(tree)
    assert set(token_paths(tree)) == slow_best_first(draft, num_nodes)


@pytest.mark.usefixtures("unstable_sort")
@pytest.mark.parametrize("score", [0.0, -1e-6, -3.0, -1e4, -1e8])
@pytest.mark.parametrize("num_nodes", [2, 4, 7, 20])
def test_a_chain_of_sure_tokens_grows_from_the_root(num_nodes: int, score: float):
    # One beam whose first token has this score and whose other tokens are sure. Its rivals are
    # less probable.
    length, width = 6, 3
    tokens = np.arange(length * width).reshape(length, width)
    scores = np.full((length, width), 3 * score - 3)
    scores[:, 0] = score
    parents = np.tile([0, 1, 2], (length, 1))
    parents[0] = 0
    tree = draft_of(tokens, parents, scores).best_first(num_nodes)
    assert_is_a_tree(tree)
    chain = min(num_nodes, length + 1)
    assert (100, *range(0, (chain - 1) * width, width)) in token_paths(tree)
    if num_nodes <= length + 1:
        assert tree.depths.tolist() == list(range(num_nodes))


def test_more_nodes_than_paths_is_the_whole_pool():
    draft = random_draft(0, length=3, width=2)
    tree = draft.best_first(50)
    assert_is_a_tree(tree)
    assert sorted(tree.tokens.tolist()) == [0, 1, 2, 3, 4, 5, 100]
    assert set(token_paths(tree)) == slow_best_first(draft, 50)


def test_one_node_is_the_root():
    tree = random_draft(0, length=3, width=2).best_first(1)
    assert tree.tokens.tolist() == [100]
    assert tree.parents.tolist() == [0]
    assert tree.mask.tolist() == [[True]]


def test_best_first_of_one_beam_is_a_chain():
    tree = random_draft(1, length=6, width=1).best_first(4)
    assert tree.tokens.tolist() == [100, 0, 1, 2]
    assert tree.parents.tolist() == [0, 0, 1, 2]


def likeliest_line(draft: Draft) -> list[int]:
    """Return the tokens of the root, its likeliest child, that node's likeliest child, ..."""
    scores = draft.scores.tolist()
    line = [0]
    while children := [n for n, p in enumerate(draft.parents.tolist()) if n and p == line[-1]]:
        line.append(max(children, key=scores.__getitem__))
    return [draft.tokens.tolist()[node] for node in line]


@pytest.mark.parametrize("num_nodes", [2, 5, 13, 30])
@pytest.mark.parametrize("seed", range(20))
def test_the_line_of_likeliest_children_comes_first(seed: int, num_nodes: int):
    draft = random_draft(seed, length=5, width=4)
    tree = draft.best_first(num_nodes)
    line = likeliest_line(draft)
    tokens = tree.tokens.tolist()
    kept = [token for token in line if token in tokens]
    assert tokens[: len(kept)] == kept == line[: len(kept)]
    assert tree.parents.tolist()[1 : len(kept)] == list(range(len(kept) - 1))


@pytest.mark.parametrize("num_nodes", [2, 5, 13])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_say_how_many_nodes_are_likelier(seed: int, num_nodes: int):
    draft = random_draft(seed, length=5, width=4)
    tree = draft.best_first(num_nodes)
    assert tree.ranks is not None
    score = dict(zip(draft.tokens.tolist(), draft.scores.tolist(), strict=True))
    scores = [score[token] for token in tree.tokens.tolist()]
    assert tree.ranks.tolist() == [sum(one > own for one in scores) for own in scores]


@pytest.mark.parametrize("num_nodes", [2, 300])
def test_of_very_many_nodes_the_most_probable_are_taken(num_nodes: int):
    draft = random_draft(0, length=30, width=40)  # 1,201 nodes
    tree = draft.best_first(num_nodes)
    assert_is_a_tree(tree)
    assert set(token_paths(tree)) == slow_best_first(draft, num_nodes)


@pytest.mark.parametrize("num_nodes", [1, 3, 6, 20])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_chain_is_the_likeliest_beam(seed: int, num_nodes: int):
    draft = random_draft(seed, length=5, width=4)
    tree = draft.best_chain(num_nodes)
    assert_is_a_tree(tree)
    assert tree.tokens.tolist() == draft.beams()[0][:num_nodes]
    assert tree.max_depth == tree.tokens.size - 1 == max(tree.depths.tolist())


@pytest.mark.parametrize("seed", range(6))
def test_beams_lead_from_the_root_most_probable_first(seed: int):
    draft = random_draft(seed, length=4, width=5)
    full = [path for path in token_paths(draft) if len(path) == 5]
    scores = dict(zip(token_paths(draft), draft.scores.tolist(), strict=True))
    assert draft.beams() == [list(path) for path in sorted(full, key=lambda path: -scores[path])]


def test_scores_that_are_no_numbers_are_never_preferred():
    tokens, parents = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[0, 0], [0, 1], [0, 1]])
    scores = np.array([[-1.0, np.nan], [-2.0, np.nan], [-3.0, np.nan]])
    for num_nodes in range(2, 8):
        tree = draft_of(tokens, parents, scores).best_first(num_nodes)
        assert_is_a_tree(tree)
        assert tree.tokens.tolist()[:4] == [100, 1, 3, 5][:num_nodes]


def test_a_chain_follows_its_root():
    draft = Draft.chain(ROOT, [4, 9, 4])
    assert token_paths(draft) == [(100,), (100, 4), (100, 4, 9), (100, 4, 9, 4)]
    assert draft.beams() == [[100, 4, 9, 4]]
    tree = draft.best_first(3)
    assert_is_a_tree(tree)
    assert tree.tokens.tolist() == [100, 4, 9]


@pytest.mark.parametrize("seed", range(6))
def test_a_draft_that_the_host_knows_makes_the_same_trees(seed: int) -> None:
    draft = random_draft(seed, 3, 3)
    rows = mx.stack([draft.tokens, draft.parents, draft.depths], axis=1).tolist()
    known = KnownDraft.of([tuple(row) for row in rows], draft.scores.tolist())
    for count in (1, 2, 5, 9, 50):
        tree, expected = known.best_first(count), draft.best_first(count)
        assert token_paths(tree) == token_paths(expected)
        assert tree.mask.tolist() == expected.mask.tolist()
        assert tree.depths.tolist() == expected.depths.tolist()
        assert tree.max_depth == tree.depths.max().item()
        assert tree.in_line == (tree.parents.tolist() == [0, *range(len(token_paths(tree)) - 1)])
        if count > 1:
            assert tree.ranks is not None
            assert expected.ranks is not None
            assert tree.ranks.tolist() == expected.ranks.tolist()
    assert known.best_chain(3).tokens.tolist() == draft.best_chain(3).tokens.tolist()
    assert known.beams() == draft.beams()
