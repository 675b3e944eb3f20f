"""Beams become trees that hold every prefix once, and trees become the same beams again."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.core.prefix_tree import BeamLevels, PrefixTree, ancestors
from mlx_distill.speculation.statistics import DraftCounters

FORKED = [[91, 92, 93], [91, 92, 94]]
GOLDEN = [[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]]


def random_beams(seed: int) -> list[list[int]]:
    """Return up to eight beams of one length, of few enough tokens that they share prefixes."""
    random = np.random.default_rng(seed)
    shape = random.integers(1, 9), random.integers(0, 8)
    return [[7, *beam] for beam in random.integers(0, 3, shape).tolist()]


def token_paths(tree: PrefixTree) -> list[tuple[int, ...]]:
    """Return the tokens from the root to each node."""
    tokens = tree.tokens.tolist()
    return [tuple(tokens[node] for node in path) for path in tree.paths()]


def slow_mask(parents: Sequence[int]) -> np.ndarray:
    """Return the nodes on the way from each node to the root, by walking it."""
    mask = np.zeros((len(parents), len(parents)), bool)
    for node in range(len(parents)):
        here = node
        while not mask[node, here]:
            mask[node, here] = True
            here = parents[here]
    return mask


# Trees of beams


def test_a_shared_prefix_is_packed_once():
    tree = PrefixTree.from_beams(FORKED)
    assert tree.tokens.tolist() == [91, 92, 93, 94]
    assert tree.parents.tolist() == [0, 0, 1, 1]
    assert tree.depths.tolist() == [0, 1, 2, 2]
    assert tree.mask.astype(mx.int32).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 0, 1],
    ]


def test_nodes_come_in_the_order_in_which_beams_use_them():
    tree = PrefixTree.from_beams(GOLDEN)
    assert tree.tokens.tolist() == [91, 92, 93, 95, 94, 96, 97]
    assert tree.depths.tolist() == [0, 1, 2, 3, 2, 3, 3]
    assert tree.parents.tolist() == [0, 0, 1, 2, 1, 4, 2]
    assert tree.paths()[6] == [0, 1, 2, 6]


def test_a_token_under_two_parents_is_two_nodes():
    tree = PrefixTree.from_beams([[1, 2, 9], [1, 3, 9]])
    assert tree.tokens.tolist() == [1, 2, 9, 3, 9]


def test_beams_may_have_different_lengths():
    tree = PrefixTree.from_beams([[1, 2], [1, 2, 3, 4], [1]])
    assert tree.tokens.tolist() == [1, 2, 3, 4]
    assert tree.depths.tolist() == [0, 1, 2, 3]


def test_beams_may_be_an_array():
    tree = PrefixTree.from_beams(np.array(GOLDEN))
    assert token_paths(tree) == token_paths(PrefixTree.from_beams(GOLDEN))


def test_a_root_alone():
    for tree in (PrefixTree.root(mx.array([5])), PrefixTree.from_beams([[5]])):
        assert tree.tokens.tolist() == [5]
        assert tree.parents.tolist() == [0]
        assert tree.depths.tolist() == [0]
        assert tree.mask.tolist() == [[True]]
        assert tree.paths() == [[0]]


@pytest.mark.parametrize("seed", range(40))
def test_a_node_per_distinct_prefix_and_the_beams_come_back(seed: int):
    beams = random_beams(seed)
    tree = PrefixTree.from_beams(beams)
    prefixes = {tuple(beam[:end]) for beam in beams for end in range(1, len(beam) + 1)}
    paths = token_paths(tree)
    assert len(paths) == len(prefixes)
    assert set(paths) == prefixes
    assert {path for path in paths if len(path) == len(beams[0])} == set(map(tuple, beams))


@pytest.mark.parametrize("seed", range(40))
def test_masks_depths_and_parents_agree(seed: int):
    tree = PrefixTree.from_beams(random_beams(seed))
    parents = tree.parents.tolist()
    assert all(parent < node for node, parent in enumerate(parents[1:], start=1))
    assert tree.depths.tolist() == [len(path) - 1 for path in tree.paths()]
    np.testing.assert_array_equal(np.array(tree.mask), slow_mask(parents))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 9, 17])
def test_a_chain_of_any_depth_sees_all_of_its_ancestors(depth: int):
    parents = [0, *range(depth)]
    mask = np.array(ancestors(mx.array(parents), depth))
    np.testing.assert_array_equal(mask, np.tri(depth + 1, dtype=bool))


def test_beams_without_a_common_first_token_are_refused():
    with pytest.raises(ValueError, match="beams must begin with the same token"):
        PrefixTree.from_beams([[1, 2], [3, 2]])


@pytest.mark.parametrize("beams", [[], [[]]])
def test_empty_beams_are_refused(beams: list[list[int]]):
    with pytest.raises(ValueError, match="beams must hold at least one token"):
        PrefixTree.from_beams(beams)


# Trees of the most probable paths

ROOT = mx.array([100])


def levels_of(tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> BeamLevels:
    return BeamLevels(mx.array(tokens), mx.array(parents), mx.array(scores.astype(np.float32)))


def random_levels(seed: int, length: int, width: int, sure: float = 0.0) -> BeamLevels:
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
    return levels_of(np.arange(length * width).reshape(length, width), parents, scores)


def slow_best_first(levels: BeamLevels, num_nodes: int) -> set[tuple[int, ...]]:
    """Return the most probable token paths, the root's own among them; a parent wins a tie."""
    tokens, parents, scores = (
        np.array(x).tolist() for x in (levels.tokens, levels.parents, levels.scores)
    )
    pool = []
    for level in range(len(tokens)):
        for beam in range(len(tokens[0])):
            path, here = [], beam
            for back in range(level, -1, -1):
                path.append(tokens[back][here])
                here = parents[back][here]
            pool.append((-scores[level][beam], level, (100, *path[::-1])))
    return {(100,)} | {path for _, _, path in sorted(pool)[: num_nodes - 1]}


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
    levels = random_levels(seed, length=5, width=4)
    tree = levels.best_first(ROOT, num_nodes)
    assert_is_a_tree(tree)
    assert tree.tokens.size == num_nodes
    assert set(token_paths(tree)) == slow_best_first(levels, num_nodes)


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
    levels = random_levels(seed, length=6, width=3, sure=0.7)
    tree = levels.best_first(ROOT, num_nodes)
    assert_is_a_tree(tree)
    assert set(token_paths(tree)) == slow_best_first(levels, num_nodes)


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
    tree = levels_of(tokens, parents, scores).best_first(ROOT, num_nodes)
    assert_is_a_tree(tree)
    chain = min(num_nodes, length + 1)
    assert (100, *range(0, (chain - 1) * width, width)) in token_paths(tree)
    if num_nodes <= length + 1:
        assert tree.depths.tolist() == list(range(num_nodes))


def test_more_nodes_than_paths_is_the_whole_pool():
    levels = random_levels(0, length=3, width=2)
    tree = levels.best_first(ROOT, 50)
    assert_is_a_tree(tree)
    assert sorted(tree.tokens.tolist()) == [0, 1, 2, 3, 4, 5, 100]
    assert set(token_paths(tree)) == slow_best_first(levels, 50)


def test_one_node_is_the_root():
    tree = random_levels(0, length=3, width=2).best_first(ROOT, 1)
    assert tree.tokens.tolist() == [100]
    assert tree.parents.tolist() == [0]
    assert tree.mask.tolist() == [[True]]


def test_best_first_of_one_beam_is_a_chain():
    tree = random_levels(1, length=6, width=1).best_first(ROOT, 4)
    assert tree.tokens.tolist() == [100, 0, 1, 2]
    assert tree.parents.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("num_nodes", [2, 5, 13, 30])
@pytest.mark.parametrize("seed", range(20))
def test_the_likeliest_beam_comes_first(seed: int, num_nodes: int):
    levels = random_levels(seed, length=5, width=4)
    tree = levels.best_first(ROOT, num_nodes)
    beam = levels.beams(ROOT)[0].tolist()
    tokens = tree.tokens.tolist()
    kept = [token for token in beam if token in tokens]
    assert tokens[: len(kept)] == kept == beam[: len(kept)]
    assert tree.parents.tolist()[1 : len(kept)] == list(range(len(kept) - 1))


@pytest.mark.parametrize("seed", range(6))
def test_beams_lead_back_to_the_root_most_probable_first(seed: int):
    levels = random_levels(seed, length=4, width=5)
    tokens, parents = np.array(levels.tokens), np.array(levels.parents)
    expected = []
    for beam in np.argsort(-np.array(levels.scores[-1])):
        path, here = [], beam
        for level in reversed(range(4)):
            path.append(int(tokens[level, here]))
            here = parents[level, here]
        expected.append([100, *path[::-1]])
    assert levels.beams(ROOT).tolist() == expected


# The share of tokens that prefix sharing saves


@pytest.mark.parametrize(
    ("beams", "verified", "unshared"),
    [
        ([[5]], 1, 1),
        ([[5, 1, 2, 3]], 4, 4),
        (FORKED, 4, 6),
        (GOLDEN, 7, 12),
        ([[5, 1], [5, 2], [5, 3]], 4, 6),
        # The tree does not know of a beam that is all of another's prefix.
        ([[5, 1, 2], [5, 1], [5, 3]], 4, 5),
    ],
)
def test_the_counts_of_one_tree(beams: list[list[int]], verified: int, unshared: int):
    counters = DraftCounters()
    counters.add(PrefixTree.from_beams(beams).parents.tolist(), 0)
    assert counters.target_calls == 1
    assert counters.drafted_tokens == verified - 1
    assert counters.verified_tokens == verified
    assert counters.beam_tokens == unshared


def test_counters_add_up_over_cycles():
    counters = DraftCounters()
    counters.add([0], 0)
    counters.add([0, 0, 1, 2, 1, 4, 2], 3)
    counters.add([0, 0, 0], 1)
    assert counters.target_calls == 3
    assert counters.drafted_tokens == 0 + 6 + 2
    assert counters.verified_tokens == 1 + 7 + 3
    assert counters.beam_tokens == 1 + 12 + 4
    assert counters.accepted_depths == [2, 1, 1]
    assert counters.acceptance_by_depth == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_no_depth_was_reached_where_nothing_was_verified():
    assert DraftCounters().acceptance_by_depth == []
