"""A tree that is chosen once: of which choices of every head it is made, whatever they are.

Of what stands next in the text, a head's first choice is right so often, its second so often:

    head 1   .60  .15  .10        root - 0 - 0 - 0       the likeliest paths of choices, products
    head 2   .40  .20  .10               |   `- 1        of these: 0, 0 0, 1, 0 0 0, 0 1
    head 3   .30  .10  .05               `- 1

Then nothing is left to be compared when a draft is made: tokens are put where they belong.

Source:
    Cai et al. 2024, arXiv:2401.10774, section 2.3.3 (sparse trees).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Integer

from mlx_distill.core.draft import Draft, arranged
from mlx_distill.core.prefix_tree import PrefixTree

Path = tuple[int, ...]
Rates = Sequence[Sequence[float]]
LEAST_RATE = 1e-6  # of what never happened in a sample


def likeliest_paths(rates: Rates, count: int) -> list[tuple[Path, float]]:
    """Return paths of choices and how likely they are, the likeliest first.

    Every path comes behind those that it goes on from.

    Args:
        rates: For every head, the shares of its first, second, ... choice.
        count: Of the paths, at the most.
    """
    waiting: list[tuple[float, int, Path]] = [(-1.0, 0, ())]
    found: list[tuple[Path, float]] = []
    while waiting and len(found) <= count:
        negative, depth, path = heapq.heappop(waiting)
        found.append((path, -negative))
        for choice, rate in enumerate(rates[depth] if depth < len(rates) else ()):
            further = (negative * max(rate, LEAST_RATE), depth + 1, (*path, choice))
            heapq.heappush(waiting, further)
    return found[1:]


@dataclass(frozen=True)
class StaticTree:
    """The shape of drafts, with everything that is known without their tokens.

    Args:
        places: Of every node but the root: which of the heads' choices it is, head by head.
        parents: Of every node.
        mask: Row i holds the ancestors of node i and i itself.
        depths: Of every node.
        scores: The logarithm of how likely each path is.
        ranks: How many nodes are likelier than each.
        choices: Of every head that the tree has a use for.
        heads: That it has a use for.
        in_line: Whether every node follows the one before it.
    """

    places: mx.array
    parents: mx.array
    mask: mx.array
    depths: mx.array
    scores: mx.array
    ranks: mx.array
    choices: int
    heads: int
    in_line: bool

    @classmethod
    def of(cls, rates: Rates, num_nodes: int) -> "StaticTree":
        """Return the tree of the root and the likeliest paths.

        Args:
            rates: For every head, the shares of its first, second, ... choice.
            num_nodes: The root included; at least one path there is.
        """
        likely = likeliest_paths(rates, max(1, num_nodes - 1))
        paths = [(), *(path for path, _ in likely)]
        index = {path: node for node, path in enumerate(paths)}
        order, parents, mask = arranged([index[path[:-1]] for path in paths], range(len(paths)))
        choices = 1 + max(path[-1] for path in paths[1:])
        scores = np.log([1.0, *(share for _, share in likely)])[order]
        depths = [len(paths[node]) for node in order]
        places = [choices * (len(paths[n]) - 1) + paths[n][-1] for n in order[1:]]
        return cls(
            places=mx.array(places),
            parents=mx.array(parents),
            mask=mx.array(mask),
            depths=mx.array(depths),
            scores=mx.array(scores.astype(np.float32)),
            ranks=mx.array(order),
            choices=choices,
            heads=max(depths),
            in_line=depths == list(range(len(depths))),
        )

    def draft(self, tokens: Integer[mx.array, " N"]) -> "StaticDraft":
        """Return the draft of the nodes' tokens."""
        tree = PrefixTree(
            tokens, self.parents, self.mask, self.depths, self.heads, self.ranks, self.in_line
        )
        return StaticDraft(tokens, self.parents, self.depths, self.scores, self.heads, tree=tree)


@dataclass(frozen=True)
class StaticDraft(Draft):
    """A draft that is a tree already.

    Args:
        tree: The tree.
    """

    tree: PrefixTree | None = None

    def best_first(self, num_nodes: int) -> PrefixTree:
        """Return the tree; a part of it if fewer nodes are asked for."""
        if self.tree is not None and num_nodes >= self.tokens.size:
            return self.tree
        return super().best_first(num_nodes)
