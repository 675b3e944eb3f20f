"""Which drafts a step learns: a function of the step's number, so that a run can go on anywhere.

What the target computes for an answer is kept while drafts are learned from it. Where that does not
fit in memory for all answers, they come in groups, and the target reads a group again when it is
its turn:

    epoch 0    group 1: steps 0 1 2   group 0: steps 3 4 5
    epoch 1    group 0: steps 6 7 8   group 1: steps 9 10 11

A step takes its starts from a whole group at random, so neighbours in a text rarely come together.
Where their texts are read with them, that would be nearly all texts in every step; then a step
takes its starts from a few.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Where a step takes its starts from few answers, these have twice as many, and at least so many:
# 256 starts in two or three answers teach less than ones in twenty.
LEAST_TOKENS = 4096


@dataclass(frozen=True)
class StepStarts:
    """What a step learns.

    Args:
        group: Number of its group.
        numbers: Of the group's starts; each counts those rows of a view that have one ahead.
    """

    group: int
    numbers: np.ndarray


def spread_of(count: int) -> int:
    """Return among how many times their number the starts of a step are chosen."""
    return max(2, LEAST_TOKENS // count)


class StartOrder:
    """The order of drafts, which only the seed decides.

    Args:
        sizes: Of each answer, how many drafts can start in it.
        rows: Of each answer, how many rows of a view it is.
        most_rows: Of a group; an answer with more is a group of its own.
        count: Starts of a step; a smaller group has fewer.
        seed: Decides.
        spread: The answers of a step have so many times its starts; 0 takes them from all.
        share: Of the places in the answers, those at which an epoch has starts; others in another.

    Attributes:
        groups: The answers of each group, in ascending order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rows: Sequence[int],
        most_rows: int,
        count: int,
        seed: int,
        spread: int = 0,
        share: float = 1.0,
    ):
        self._seed = seed
        self._spread = spread
        self._share = share
        self._sizes: list[int] = []
        self.groups: list[list[int]] = []
        total = most_rows + 1
        for answer in np.random.default_rng([seed, 7]).permutation(len(sizes)).tolist():
            if not sizes[answer]:
                continue
            if total + rows[answer] > most_rows:
                self.groups.append([])
                self._sizes.append(0)
                total = 0
            self.groups[-1].append(answer)
            self._sizes[-1] += sizes[answer]
            total += rows[answer]
        for group in self.groups:
            group.sort()
        self._of_answers = [[sizes[answer] for answer in group] for group in self.groups]
        self._counts = [min(count, size) for size in self._sizes]
        pairs = zip(self._sizes, self._counts, strict=True)
        self._steps = [max(1, int(size * share) // count) for size, count in pairs]
        self._known: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """How many steps see the answers once; the last starts of a group may be left out."""
        return sum(self._steps)

    @property
    def starts_per_epoch(self) -> int:
        """How many starts all steps of an epoch have."""
        return sum(n * count for n, count in zip(self._steps, self._counts, strict=True))

    @property
    def most_starts(self) -> int:
        """How many starts a step has at most; those of a small group have fewer."""
        return max(self._counts)

    def at(self, step: int) -> StepStarts:
        """Return what a step learns; steps count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch, 11]).permutation(len(self.groups))
        for group in order.tolist():
            if place < self._steps[group]:
                first = place * self._counts[group]
                starts = self._shuffled(epoch, group)
                return StepStarts(group, starts[first : first + self._counts[group]])
            place -= self._steps[group]
        raise AssertionError("a step lies in its epoch")

    def _shuffled(self, epoch: int, group: int) -> np.ndarray:
        if self._known is None or self._known[0] != (epoch, group):
            random = np.random.default_rng([self._seed, epoch, group, 13])
            if self._spread:
                order = self._from_few(group, random)
            else:
                order = random.permutation(self._sizes[group])
            self._known = (epoch, group), order
        return self._known[1]

    def _from_few(self, group: int, random: np.random.Generator) -> np.ndarray:
        """Return a group's starts in an order in which those of a step are of few answers."""
        sizes, count = self._of_answers[group], self._counts[group]
        runs = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        starts = np.concatenate([runs[one] for one in random.permutation(len(runs)).tolist()])
        wanted = self._steps[group] * count
        share = max(self._share, wanted / starts.size)  # of few, a step takes more
        size, parts = self._spread * count, []
        for first in range(0, starts.size, size):
            part = random.permutation(starts[first : first + size])
            parts.append(part[: math.ceil(part.size * share)])
        whole = np.concatenate(parts)[:wanted].reshape(-1, count)
        return whole[random.permutation(len(whole))].reshape(-1)
