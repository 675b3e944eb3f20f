"""How many tokens a shape of draft is worth, learned from what became of other shapes.

A best-first tree of N nodes holds the N likeliest nodes of its draft. So a tree tells what became
of every smaller one: a node that was accepted would have been so in all the trees that it is in.
What is counted is therefore not how often a shape did well, but how often the i-th likeliest node
was accepted, among the nodes that a draft of a length and a width has:

    likeliest first   A B C D E          accepted: A B D, of 5 nodes
    trees of          1 2 3 4 5  nodes
    tokens            1 2 2 3 3          one more each for the token drawn at the end

Shapes that are larger than all that were tried are extrapolated by a model: every node's r-th child
is the right one with a probability that falls geometrically with r, and the tree takes the
likeliest paths. Its one parameter is fitted to what was seen.

Source:
    Chen et al. 2024, Sequoia, arXiv:2402.12374, section 3.1 (tokens of a tree whose children's
    acceptance depends on their rank); Wang et al. 2024, OPT-Tree, arXiv:2406.17276 (the expected
    length is the sum of the nodes' path probabilities, so the likeliest nodes are the best tree).
"""

import bisect
import heapq
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mlx_distill.drafters.protocol import DraftPlan

# The share of a node's acceptance that each further child has of the one before it, and the
# acceptance before anything is known. Over 15 shapes from 2 to 33 nodes, the model is off by 4 % of
# the bundled pair's tokens per cycle at temperature 0 (0.2 and 0.90), by 2 % at 1 (0.3 and 0.75).
FURTHER_CHILD, FIRST_GUESS = 0.27, 0.8
# The model counts as much as so many cycles.
MODEL_WEIGHT = 8.0
# What nobody has tried is taken to be so much better than the model says, so that it is tried.
HOPE = 0.05
# What a cycle counts after one more: about the last two hundred cycles decide.
MEMORY = 0.995


class Acceptance:
    """How often the i-th likeliest node is accepted, by length and width of the draft.

    Args:
        lengths: Lengths of drafts that can be asked about; ascending.
        widths: Beam widths that can be asked about; ascending.
        num_nodes: The largest tree that can be asked about.
    """

    def __init__(self, lengths: Sequence[int], widths: Sequence[int], num_nodes: int):
        self.lengths, self.widths = tuple(lengths), tuple(widths)
        self.num_nodes = num_nodes
        shape = len(lengths), len(widths), num_nodes
        self.accepted = np.zeros(shape)
        self.seen = np.zeros(shape)
        self._depth_limits = np.array(lengths)[:, None, None]
        self._width_limits = np.array(widths)[None, :, None]

    def copy(self, cycles: float) -> "Acceptance":
        """Return one that knows the same, but has it only from so many cycles at most."""
        other = Acceptance(self.lengths, self.widths, self.num_nodes)
        most = self.cycles
        share = min(1.0, cycles / most) if most else 0.0
        other.accepted, other.seen = share * self.accepted, share * self.seen
        return other

    @property
    def cycles(self) -> float:
        """The number of cycles that are remembered, the older ones counted less."""
        return float(self.seen.max())

    def learn(
        self,
        plan: DraftPlan,
        parents: Sequence[int],
        path: Sequence[int],
        ranks: Sequence[int] = (),
    ) -> None:
        """Take in what became of a tree.

        Args:
            plan: What was drafted.
            parents: Of the tree's nodes.
            path: The nodes that were accepted; the root may be among them.
            ranks: How many nodes are likelier than each; without them, as many as come before.
        """
        order = sorted(range(len(parents)), key=ranks.__getitem__) if ranks else range(len(parents))
        places = {node: place for place, node in enumerate(order)}
        depths, beams = _depths_and_beams([places[parents[node]] for node in order])
        within = (depths <= self._depth_limits) & (beams < self._width_limits)
        within[..., self.num_nodes :] = False
        position = within.cumsum(axis=-1) - 1
        # A larger draft than the one that was made would have held other nodes, too.
        known = (self._depth_limits <= plan.draft_length) & (self._width_limits <= plan.beam_width)
        size = position[..., -1:] + 1
        self.accepted *= MEMORY
        self.seen *= MEMORY
        places_in = np.arange(self.num_nodes)
        # A narrower or shorter draft's tree of as many nodes would hold some that were left out
        # here. Those were less likely than the last one that is in.
        most = np.minimum(len(parents), 1 + self._depth_limits * self._width_limits)
        left_out = known & (places_in >= size) & (places_in < most)
        self.accepted += left_out * self._last_rate(plan, len(parents))
        self.seen += known & (places_in < most)
        for node in path:
            place = places[node]
            if place:
                found = np.nonzero(within[..., place] & known[..., 0])
                self.accepted[(*found, position[..., place][found])] += 1

    def tokens(self) -> np.ndarray:
        """Return the tokens that a cycle adds, by length, width, and nodes less one."""
        model = model_rates(self._fitted(), self.lengths, self.widths, self.num_nodes)
        unknown = MODEL_WEIGHT / (self.seen + MODEL_WEIGHT)
        rates = self.accepted / (self.seen + MODEL_WEIGHT)
        rates += unknown * (1 + HOPE * unknown) * model
        rates[..., 0] = 1  # the token that is drawn at the end of the path
        return rates.cumsum(axis=-1)

    def _last_rate(self, plan: DraftPlan, num_nodes: int) -> float:
        """Return how often the last node of a shape's tree was accepted."""
        row = np.searchsorted(self.lengths, plan.draft_length, "right") - 1
        column = np.searchsorted(self.widths, plan.beam_width, "right") - 1
        place = row, column, min(num_nodes, self.num_nodes) - 1
        return float(self.accepted[place] / self.seen[place]) if self.seen[place] else 0.0

    def _fitted(self) -> float:
        """Return the model's acceptance under which it expects what was accepted."""
        if not self.seen.any():
            return FIRST_GUESS
        # Where most is known, as far as it is known.
        known = self.seen.sum(axis=-1)
        where = np.unravel_index(known.argmax(), known.shape)
        seen, accepted = self.seen[where][1:], self.accepted[where][1:]

        def expected(acceptance: float) -> np.ndarray:
            return model_rates(acceptance, self.lengths, self.widths, self.num_nodes)[where][1:]

        rates = (accepted + MODEL_WEIGHT * expected(FIRST_GUESS)) / (seen + MODEL_WEIGHT)
        wanted = rates[seen > 0].sum()
        options = [step / 40 for step in range(1, 40)]
        place = bisect.bisect_left(options, wanted, key=lambda one: expected(one)[seen > 0].sum())
        return options[min(place, len(options) - 1)]


def _depths_and_beams(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return how deep each node lies, and the place among its depth's nodes that its path needs.

    A beam search that keeps W nodes at every depth finds those whose paths never need a place
    beyond the first W.
    """
    depths, beams = [0], [0]
    counts = [1]
    for parent in parents[1:]:
        depth = depths[parent] + 1
        if depth == len(counts):
            counts.append(0)
        depths.append(depth)
        beams.append(max(beams[parent], counts[depth]))
        counts[depth] += 1
    return np.array(depths), np.array(beams)


@lru_cache(maxsize=64)
def model_rates(
    acceptance: float, lengths: tuple[int, ...], widths: tuple[int, ...], num_nodes: int
) -> np.ndarray:
    """Return how often the model accepts the i-th likeliest node, by length and width.

    Args:
        acceptance: How often any child of an accepted node is the right one, if all are there.
        lengths: Of the draft.
        widths: Of its beams.
        num_nodes: The largest tree.
    """
    parents, values = _likeliest(acceptance, 4 * num_nodes, max(lengths))
    depths, beams = _depths_and_beams(parents)
    rates = np.zeros((len(lengths), len(widths), num_nodes))
    for row, length in enumerate(lengths):
        for column, width in enumerate(widths):
            found = values[(depths <= length) & (beams < width)][:num_nodes]
            rates[row, column, : found.size] = found
    return rates


def _likeliest(acceptance: float, count: int, length: int) -> tuple[list[int], np.ndarray]:
    """Return the parents and the path probabilities of the model's likeliest nodes, best first."""
    best = acceptance * (1 - FURTHER_CHILD)
    parents, values, depths = [0], [1.0], [0]
    waiting = [(-best, 0)]  # a node that is not in the tree yet, and its parent
    while waiting and len(parents) < count:
        value, parent = heapq.heappop(waiting)
        node, depth = len(parents), depths[parent] + 1
        parents.append(parent)
        values.append(-value)
        depths.append(depth)
        heapq.heappush(waiting, (value * FURTHER_CHILD, parent))
        if depth < length:
            heapq.heappush(waiting, (value * best, node))
    return parents, np.array(values)
