"""Static trees: the likeliest paths of choices, in the order in which drafts are verified."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.static_tree import StaticTree, likeliest_paths

RATES = [[0.6, 0.15, 0.1, 0.0], [0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05, 0.0]]
# A choice that is right more often than the one before it, and a head that is always right.
ODD = [[0.1, 0.5, 0.2], [1.0, 0.0, 0.0]]


def slow_paths(rates: list[list[float]]) -> dict[tuple[int, ...], float]:
    """Return all paths and the products of their rates."""
    lengths = range(1, len(rates) + 1)
    paths = [path for length in lengths for path in product(range(len(rates[0])), repeat=length)]
    return {
        path: float(np.prod([max(head[one], 1e-6) for head, one in zip(rates, path, strict=False)]))
        for path in paths
    }


@pytest.mark.parametrize("rates", [RATES, ODD], ids=["decreasing", "odd"])
@pytest.mark.parametrize("count", [1, 4, 9, 200])
def test_the_likeliest_paths_are_found(rates: list[list[float]], count: int) -> None:
    every = slow_paths(rates)
    found = likeliest_paths(rates, count)
    assert len(found) == min(count, len(every))
    for place, (path, share) in enumerate(found):
        assert share == pytest.approx(every[path])
        assert len(path) == 1 or path[:-1] in [one for one, _ in found[:place]]
    expected = sorted(every.values(), reverse=True)[: len(found)]
    assert [share for _, share in found] == pytest.approx(expected)


@pytest.mark.parametrize("rates", [RATES, ODD], ids=["decreasing", "odd"])
@pytest.mark.parametrize("num_nodes", [1, 2, 6, 11])
def test_a_tree_puts_choices_where_they_belong(rates: list[list[float]], num_nodes: int) -> None:
    static = StaticTree.of(rates, num_nodes)
    choices = np.arange(static.heads * static.choices)  # head h's choice c is the token 10 h + c
    tokens = 10 * (choices // static.choices) + choices % static.choices
    draft = static.draft(mx.concatenate([mx.array([99]), mx.array(tokens)[static.places]]))
    tree = draft.best_first(max(2, num_nodes))
    paths = [tuple(int(tree.tokens[node].item()) for node in one[1:]) for one in tree.paths()]
    likely = [(), *(path for path, _ in likeliest_paths(rates, max(1, num_nodes - 1)))]
    named = [tuple(10 * head + one for head, one in enumerate(path)) for path in likely]
    assert tree.tokens[0].item() == 99
    assert sorted(paths) == sorted(named)
    assert [named.index(path) for path in paths] == np.array(tree.ranks).tolist()
    slow = PrefixTree.from_parents(tree.tokens, tree.parents, 3)
    assert mx.array_equal(tree.mask, slow.mask)
    assert mx.array_equal(tree.depths, slow.depths)
    assert tree.in_line == all(tree.parents[1:] == mx.arange(tree.tokens.size - 1))
    best = max((path for path in named if path), key=lambda path: named.index(path) == 1)
    assert paths[1] == best
    assert tree.max_depth == max(map(len, paths))
    scores = {path: slow_paths(rates)[path] for path in likely[1:]}
    expected = [0.0, *(np.log(scores[likely[named.index(path)]]) for path in paths[1:])]
    np.testing.assert_allclose(np.array(draft.scores), expected, rtol=1e-5)


def test_a_part_of_a_tree_is_the_smaller_tree() -> None:
    large, small = StaticTree.of(RATES, 12), StaticTree.of(RATES, 5)
    tokens = mx.concatenate([mx.array([7]), large.places + 100 * large.depths[1:]])
    found = large.draft(tokens).best_first(5)
    expected = small.draft(tokens[:5]).best_first(5)
    assert mx.array_equal(found.parents, expected.parents)
    assert mx.array_equal(found.mask, expected.mask)
