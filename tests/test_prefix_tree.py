"""Beams become trees that hold every prefix once, and trees become the same beams again."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.core.prefix_tree import PrefixTree, ancestors
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
