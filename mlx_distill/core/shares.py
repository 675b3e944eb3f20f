"""Nodes shared by the texts of a call: as many to each as bring the most tokens to all.

    nodes    1    2    4    8          of 10 nodes: 1 to the first text, 8 to the second, 1 to the
    text 1   1   1.2  1.3  1.35        third; even shares of 3, or 2, would bring less
    text 2   1   1.8  2.7  3.6
    text 3   1   1.3  1.5  1.6

What a text's next nodes bring falls with their number, so one threshold of gain per node would do,
were any size allowed. But every size of tree is a shape to compile, so few are, and the best shares
are found by going through the texts with all totals at once: a few thousand sums.

Source:
    Liu et al. 2024, SmartSpec, arXiv:2406.14066 (goodput: what a batch verifies follows from what
    it is expected to accept); Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11
    (multiple choice: exactly one size of each).
"""

from collections.abc import Sequence

import numpy as np


def shares(values: Sequence[Sequence[float]], sizes: Sequence[int], total: int) -> list[int]:
    """Return how many nodes each text gets, so that the sum of values is the greatest.

    Among equal sums it is one with the fewest nodes.

    Args:
        values: For every text what each of the sizes is worth to it.
        sizes: Ascending; every text gets one of them.
        total: What all may have together; at least the smallest size for each.
    """
    best = np.full(total + 1, -np.inf)  # by nodes, of the texts so far
    best[0] = 0.0
    choices = []
    for row in values:
        with_size = np.full((len(sizes), total + 1), -np.inf)
        for place, (size, value) in enumerate(zip(sizes, row, strict=True)):
            with_size[place, size:] = best[: max(0, total + 1 - size)] + value
        choices.append(with_size.argmax(axis=0))
        best = with_size.max(axis=0)
    left, found = int(best.argmax()), []
    for choice in reversed(choices):
        found.append(sizes[choice[left]])
        left -= found[-1]
    return found[::-1]
