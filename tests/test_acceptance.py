"""How many tokens shapes of draft are worth, learned from what became of others."""

import itertools

import numpy as np
import pytest
from simulated import LENGTHS, WIDTHS, Text, recorded_texts

from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.speculation.acceptance import Acceptance, model_rates


@pytest.fixture(scope="module")
def texts() -> dict[str, Text]:
    return recorded_texts()


def accepted_of(tree: Acceptance, plan: DraftPlan, num_cycles: int, texts: Text) -> None:
    for place in range(num_cycles):
        tree.learn(plan, *texts.tree(place, plan))


@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 4, 8), (4, 3, 8), (4, 6, 17), (8, 8, 33)])
def test_a_large_tree_tells_what_smaller_ones_would_come_to(
    texts: dict[str, Text], shape: tuple[int, int, int]
) -> None:
    text, cycles = texts["greedy"], 440
    known = Acceptance(LENGTHS, WIDTHS, 33)
    accepted_of(known, DraftPlan(8, 8, 33), cycles, text)
    plan = DraftPlan(*shape)
    weights = 0.995 ** np.arange(cycles)[::-1]
    truth = [len(text.tree(place, plan)[1]) for place in range(cycles)]
    found = known.tokens()[LENGTHS.index(shape[1]), WIDTHS.index(shape[0]), shape[2] - 1]
    assert found == pytest.approx((weights * truth).sum() / weights.sum(), rel=0.04)


def test_ranks_say_which_nodes_are_likely() -> None:
    """Nodes may lie in any order that puts parents first."""
    plain, ranked = (Acceptance((1, 2), (1, 2), 4) for _ in range(2))
    plain.learn(DraftPlan(2, 2, 4), (0, 0, 0, 1), (0, 1, 3))
    ranked.learn(DraftPlan(2, 2, 4), (0, 0, 1, 0), (0, 1, 2), (0, 1, 3, 2))
    assert np.array_equal(plain.tokens(), ranked.tokens())
    assert not np.array_equal(plain.tokens(), Acceptance((1, 2), (1, 2), 4).tokens())


@pytest.mark.parametrize("acceptance", [0.5, 0.9])
def test_the_model_is_the_best_tree_of_its_probabilities(acceptance: float) -> None:
    """Against every path of children, enumerated."""
    lengths, widths, size = (1, 3), (2, 8), 12
    found = model_rates(acceptance, lengths, widths, size)
    first = acceptance * 0.73
    for row, length in enumerate(lengths):
        values = [
            np.prod([first * 0.27**child for child in path])
            for depth in range(1, length + 1)
            for path in itertools.product(range(8), repeat=depth)
        ]
        best = sorted(values, reverse=True)[: size - 1]
        assert found[row, 1, 1 : 1 + len(best)] == pytest.approx(best, abs=2e-3)
    assert (found[:, 0] <= found[:, 1] + 1e-12).all()
