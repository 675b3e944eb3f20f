"""Nodes go to the texts that they bring the most tokens to."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.core.forest import Forest, Packing
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.shares import shares
from mlx_distill.drafters.protocol import DraftPlan, Outcome
from mlx_distill.speculation.batch_planning import SHARED_FOR, SIZES, Budget

SHAPE, PRICE = DraftPlan(4, 4, 4), 0.05


@pytest.mark.parametrize("seed", range(20))
def test_no_other_shares_are_better(seed: int) -> None:
    """Whatever the values, also where more nodes bring less."""
    draws = np.random.default_rng(seed)
    texts, sizes = int(draws.integers(1, 5)), [1, 2, 4, 7]
    values = draws.random((texts, len(sizes))).round(1).tolist()
    total = int(draws.integers(texts, 7 * texts + 2))
    found = shares(values, sizes, total)

    def worth(chosen: tuple[int, ...]) -> float:
        return sum(row[sizes.index(size)] for row, size in zip(values, chosen, strict=True))

    possible = [one for one in itertools.product(sizes, repeat=texts) if sum(one) <= total]
    assert tuple(found) in possible
    assert worth(tuple(found)) == pytest.approx(max(map(worth, possible)))
    least = min(sum(one) for one in possible if worth(one) > max(map(worth, possible)) - 1e-9)
    assert sum(found) == least


def asked(budget: Budget, accepted: list[int], cycles: int) -> list[int]:
    """Return the texts' nodes after so many cycles in which each had so many tokens accepted."""
    texts = range(len(accepted))
    sizes = [SHAPE.nodes] * len(texts)
    for _ in range(cycles):
        for text in texts:
            chain = tuple(max(0, node - 1) for node in range(sizes[text]))
            path = tuple(range(min(accepted[text] + 1, sizes[text])))
            outcome = Outcome(9, chain, len(path) - 1, path, tuple(range(len(chain))))
            sizes[text] = budget.plan(text, outcome, SHAPE, texts, PRICE).nodes
    return sizes


def test_texts_share_nodes_by_what_they_accept() -> None:
    budget = Budget([SHAPE])
    assert asked(budget, [1, 1, 1, 1], 20) == [4, 4, 4, 4]
    first, *others = asked(budget, [4, 0, 0, 0], 60)
    assert first > SHAPE.nodes
    assert sum(others) < 3 * SHAPE.nodes
    assert first + sum(others) <= 4 * SHAPE.nodes


def test_a_text_without_nodes_is_tried_again() -> None:
    budget = Budget([SHAPE])
    found = [asked(budget, [4, 0, 0, 0], SHARED_FOR)[1] for _ in range(40)]
    parked = found.index(1)
    assert max(found[parked:]) > 1


def test_parts_are_few_sizes() -> None:
    assert set(asked(Budget([SHAPE]), [4, 2, 1, 0, 0], 40)) <= set(SIZES)


def test_nodes_as_a_list() -> None:
    """Packed, apart again, and by heads; padding has the last node's entries."""
    packing = Packing((3, 1, 2))
    entries = mx.arange(9).reshape(3, 3)
    assert packing.packed(entries).tolist() == [0, 1, 2, 3, 6, 7]
    assert packing.padded(packing.packed(entries)).tolist() == [[0, 1, 2], [3, 3, 3], [6, 7, 7]]
    heads = mx.random.normal((1, 5, packing.num_nodes, 4))
    rows = packing.rows(heads)
    assert rows.shape == (3, 5, 3, 4)
    assert mx.array_equal(packing.line(rows), heads).item()
    assert mx.array_equal(rows[2, :, 1], heads[0, :, 5]).item()


def test_trees_of_about_one_size_are_padded() -> None:
    trees = [PrefixTree.chain(mx.arange(size)) for size in (8, 7, 6)]
    assert Forest.of(trees).packing is None
    assert Forest.of([*trees, PrefixTree.root(mx.array([1]))]).packing == Packing((8, 7, 6, 1))
