"""Batches of texts: what they learn, how wide they are, and in which order they come."""

import numpy as np
import pytest
from test_texts import learned

from mlx_distill.data.batches import batch_order
from mlx_distill.data.texts import Text, text_batch


def test_batch_learns_exactly_what_is_marked() -> None:
    """The mask's position t is on if token t + 1 is a real one, and marked."""
    random = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        length = int(random.integers(2, 70))
        tokens = random.integers(1, 500, length).tolist()
        texts.append(Text(tokens, (random.random(length) < 0.5).tolist()))
    rows = random.permutation(40)[:17].tolist()
    batch = text_batch(texts, rows, multiple=8)
    inputs, labels, mask = (np.array(x) for x in (batch.inputs, batch.labels, batch.mask))
    assert batch.rows == rows
    assert inputs.shape == labels.shape == mask.shape
    assert inputs.shape[0] == 17
    assert inputs.shape[1] % 8 == 0
    assert set(mask.flatten().tolist()) == {0.0, 1.0}
    for place, row in enumerate(rows):
        text = texts[row]
        for t in range(inputs.shape[1]):
            is_learned = t + 1 < len(text.tokens) and text.learned[t + 1]
            assert mask[place, t] == is_learned
            if t < len(text.tokens):
                assert inputs[place, t] == text.tokens[t]
            if t + 1 < len(text.tokens):
                assert labels[place, t] == text.tokens[t + 1]
            else:
                assert labels[place, t] == 0
        assert mask[place].sum() == len(learned(text))


@pytest.mark.parametrize(("tokens", "width"), [(2, 32), (33, 32), (34, 64), (65, 64)])
def test_batch_is_padded_to_a_multiple_of_inputs(tokens: int, width: int) -> None:
    batch = text_batch([Text([5] * tokens), Text([5, 5])], [0, 1])
    assert batch.inputs.shape == (2, width)
    assert batch.mask.sum().item() == tokens - 1 + 1


def test_no_wider_than_needed() -> None:
    texts = [Text([1] * 9), Text([1] * 100)]
    assert text_batch(texts, [0], multiple=8).inputs.shape == (1, 8)
    assert text_batch(texts, [0, 1, 0], multiple=1).inputs.shape == (3, 99)


LENGTHS = np.random.default_rng(3).integers(2, 200, 203).tolist()


PER_EPOCH = 51


def epoch(number: int, seed: int = 5) -> list[list[int]]:
    rows = batch_order(LENGTHS, 4, seed)
    return [rows(number * PER_EPOCH + step) for step in range(PER_EPOCH)]


def test_every_row_comes_once_per_epoch() -> None:
    for number in range(3):
        batches = epoch(number)
        assert sorted(row for batch in batches for row in batch) == [*range(203)]
        assert sorted(map(len, batches)) == [3, *[4] * 50]


def test_every_epoch_and_seed_is_a_new_order() -> None:
    orders = [epoch(0), epoch(1), epoch(2), epoch(0, seed=6)]
    assert all(a != b for place, a in enumerate(orders) for b in orders[:place])
    # Other batches, too, not only the same ones in another order.
    kinds = [{frozenset(batch) for batch in order} for order in orders]
    assert len(kinds[0] & kinds[1]) < 10


def test_order_is_a_function_of_the_step() -> None:
    """As a resumed run needs it: whatever was asked before, and by a fresh closure."""
    steps = [*range(3 * PER_EPOCH)]
    rows = batch_order(LENGTHS, 4, 5)
    expected = [rows(step) for step in steps]
    shuffled = np.random.default_rng(0).permutation(steps).tolist()
    assert [rows(step) for step in shuffled] == [expected[step] for step in shuffled]
    for step in (0, 50, 51, 117):
        assert batch_order(LENGTHS, 4, 5)(step) == expected[step]


def test_similar_lengths_come_together() -> None:
    def padded(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)

    shuffled = np.random.default_rng(0).permutation(203).tolist()
    plain = [shuffled[at : at + 4] for at in range(0, 203, 4)]
    assert padded(epoch(0)) < 1.2 * sum(LENGTHS) < padded(plain)
    # Short ones do not all come first: the batches are shuffled.
    longest = [max(LENGTHS[row] for row in batch) for batch in epoch(0)]
    assert longest != sorted(longest)


def test_batch_larger_than_the_data() -> None:
    rows = batch_order([3, 1, 2], 8, 0)
    assert [sorted(rows(step)) for step in range(3)] == [[0, 1, 2]] * 3
    assert rows(0) == [1, 2, 0]
