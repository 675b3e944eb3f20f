"""Which drafts a step learns: all of an epoch's, once, group by group, and the same ones again."""

import numpy as np
import pytest

from mlx_distill.distillation.start_order import LEAST_TOKENS, StartOrder, spread_of

SIZES = [5, 0, 9, 3, 12, 7, 1]
ROWS = [6, 1, 10, 4, 13, 8, 2]


def order_of(
    most_rows: int, count: int = 4, seed: int = 0, spread: int = 0, share: float = 1.0
) -> StartOrder:
    return StartOrder(SIZES, ROWS, most_rows, count, seed, spread, share)


@pytest.mark.parametrize("most_rows", [1, 14, 20, 100])
def test_groups_hold_every_answer_once_and_fit(most_rows: int):
    groups = order_of(most_rows).groups
    found = sorted(answer for group in groups for answer in group)
    assert found == [0, 2, 3, 4, 5, 6]  # nothing can start in the other
    assert all(len(g) == 1 or sum(ROWS[one] for one in g) <= most_rows for g in groups)
    assert len(order_of(100).groups) == 1


@pytest.mark.parametrize("spread", [0, 1, 2])
@pytest.mark.parametrize("most_rows", [1, 20, 100])
def test_an_epoch_takes_every_start_at_most_once(most_rows: int, spread: int):
    order = order_of(most_rows, spread=spread)
    seen: dict[int, list[int]] = {}
    for step in range(order.steps_per_epoch):
        asked = order.at(step)
        seen.setdefault(asked.group, []).extend(asked.numbers.tolist())
    assert seen.keys() == set(range(len(order.groups)))
    for group, numbers in seen.items():
        size = sum(SIZES[answer] for answer in order.groups[group])
        assert len(set(numbers)) == len(numbers) > size - 4
        assert set(numbers) <= set(range(size))


@pytest.mark.parametrize("count", [4, 10, 1000])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("most_rows", [1, 20, 100])
def test_the_starts_of_an_epoch_are_counted(most_rows: int, share: float, count: int):
    order = order_of(most_rows, count=count, share=share)
    each = [order.at(step).numbers.size for step in range(order.steps_per_epoch)]
    assert order.starts_per_epoch == sum(each) <= sum(SIZES)


def test_a_step_is_a_function_of_its_number_and_the_seed():
    def numbers(step: int, seed: int = 0) -> list[int]:
        return order_of(20, seed=seed).at(step).numbers.tolist()

    order = order_of(20)
    steps = [order.at(step) for step in range(2 * order.steps_per_epoch)]
    for step in (7, 0, len(steps) - 1):
        np.testing.assert_array_equal(steps[step].numbers, numbers(step))
    assert numbers(0) != numbers(order.steps_per_epoch)
    assert numbers(0) != numbers(0, seed=1)


def answers_of(order: StartOrder, step: int) -> set[int]:
    """Return the answers that a step's starts are of, of the one group that there is."""
    ends = np.cumsum([SIZES[answer] for answer in order.groups[0]])
    return set(np.searchsorted(ends, order.at(step).numbers, side="right").tolist())


@pytest.mark.parametrize("spread", [1, 2])
def test_a_step_may_take_its_starts_from_few_answers(spread: int):
    """Four starts, or eight of which every second is taken, are of at most so many in a row."""
    order = order_of(100, spread=spread)
    few = [answers_of(order, step) for step in range(order.steps_per_epoch)]
    assert max(map(len, few)) <= {1: 3, 2: 4}[spread]
    assert len(set.union(*few)) == 6
    first = [order.at(step).numbers for step in range(order.steps_per_epoch)]
    assert any(np.any(np.diff(numbers) < 0) for numbers in first)  # in no order
    later = [order.at(order.steps_per_epoch + step).numbers for step in range(len(first))]
    assert not all(np.array_equal(*pair) for pair in zip(first, later, strict=True))


@pytest.mark.parametrize("count", [1, 256, 1000, 2048, 4096])
def test_the_answers_of_a_step_are_many_or_have_twice_its_starts(count: int):
    assert count * spread_of(count) >= min(2 * count, LEAST_TOKENS - count)
    assert count * spread_of(count) <= max(2 * count, LEAST_TOKENS)


@pytest.mark.parametrize("spread", [0, 1, 2])
@pytest.mark.parametrize(("share", "steps"), [(1.0, 9), (0.5, 4), (0.25, 2), (0.01, 1)])
def test_an_epoch_may_learn_a_share_and_another_epoch_others(share: float, steps: int, spread: int):
    order = order_of(100, spread=spread, share=share)  # of 37 places
    assert order.steps_per_epoch == steps
    epochs = [
        {number for step in range(steps) for number in order.at(epoch * steps + step).numbers}
        for epoch in range(80)
    ]
    assert all(len(seen) == 4 * steps for seen in epochs)
    assert len(set.union(*epochs)) == 37  # sooner or later all of them


@pytest.mark.parametrize("spread", [0, 1, 2, 64])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 20, 37, 64])
def test_a_step_has_its_starts_whatever_the_share(count: int, share: float, spread: int):
    order = order_of(100, count=count, spread=spread, share=share)
    for step in range(2 * order.steps_per_epoch):
        numbers = order.at(step).numbers
        assert len(set(numbers.tolist())) == numbers.size == min(count, 37)
