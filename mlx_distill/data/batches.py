"""The order of batches, which only the seed decides."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """Return which rows a step's batch takes, as a function of the step, counted from 0.

    Every epoch is a new order. Texts of similar length come together, so little is padded: rows
    are shuffled, sorted by length within pools of sixteen batches, and the batches shuffled.
    """
    num_rows = len(lengths)
    per_epoch = -(-num_rows // batch_size)
    known: dict[int, list[list[int]]] = {}

    def rows(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in known:
            known.clear()
            known[epoch] = list(_epoch(lengths, batch_size, np.random.default_rng([seed, epoch])))
        return known[epoch][place]

    return rows


def _epoch(
    lengths: Sequence[int], batch_size: int, random: np.random.Generator
) -> Iterator[list[int]]:
    order = random.permutation(len(lengths))
    pool = 16 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        some = sorted(order[start : start + pool].tolist(), key=lambda row: lengths[row])
        batches += [some[at : at + batch_size] for at in range(0, len(some), batch_size)]
    for place in random.permutation(len(batches)):
        yield batches[place]
