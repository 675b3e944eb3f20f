"""A tree verified by steps of plain decoding, one a node: exact for every model, and no faster.

    A          steps  A  B  D  C       the caches go back to A before C is read
    B  C
    D

It serves the models whose rows cannot be told to be exact when they go together (``exact``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.head import Head
from mlx_distill.target.layer_cache import LayerCache, leaves
from mlx_distill.target.restoring import APPENDING, RestorePoint
from mlx_distill.target.tree_call import Computed, TreeCall, call_on_text


@dataclass
class StepsCall(TreeCall):
    """The outcome of the steps on a tree.

    Args:
        appended: The caches.
        before: Their state before the tree.
        after: Their states after each node.
        held: The nodes whose tokens the caches that append hold behind that, in their order.
        step: Reads a node again.
    """

    appended: Sequence[LayerCache]
    before: RestorePoint
    after: list[RestorePoint]
    held: list[int]
    step: Callable[[int], Computed]

    def commit(self, path: list[int]) -> None:
        """Keep the nodes of ``path``; those that were written over are read again."""
        self.path = path
        begin = 0
        while begin < min(len(path), len(self.held)) and path[begin] == self.held[begin]:
            begin += 1
        if not any(isinstance(cache, APPENDING) for cache in leaves(self.appended)):
            begin = len(path)
        self.rewind(begin)
        for node in path[begin:]:
            self.step(node)
            self.after[node] = RestorePoint(self.appended)

    def rewind(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        point = self.after[self.path[num_tokens - 1]] if num_tokens else self.before
        point.restore(self.appended)

    def rebase(self, caches: list[LayerCache]) -> None:
        """Stand for caches that were replaced."""
        self.appended = caches


def call_by_steps(
    model: nn.Module,
    head: Head,
    tree: PrefixTree,
    caches: list[LayerCache],
    taps: Sequence[int] = (),
) -> TreeCall:
    """Return a model's word on every node of a tree, each as a step of plain decoding says it.

    The tree's shape is read first, which waits for its draft.
    """

    def step(node: int) -> Computed:
        return call_on_text(model, head, tree.tokens[node : node + 1], caches, taps)

    paths = tree.paths()
    before, after, computed = RestorePoint(caches), {}, {}
    held: list[int] = []
    for node in sorted(range(len(paths)), key=lambda node: paths[node]):
        path = paths[node]
        (after[path[-2]] if len(path) > 1 else before).restore(caches)
        computed[node] = step(node)
        after[node] = RestorePoint(caches)
        held[len(path) - 1 :] = [node]
    rows = [computed[node] for node in range(len(paths))]
    tapped = (mx.concatenate([row.taps[tap] for row in rows]) for tap in range(len(taps)))
    logits, hidden = (mx.concatenate([row[part] for row in rows]) for part in range(2))
    whole = Computed(logits, hidden, tuple(tapped))
    points = [after[node] for node in range(len(paths))]
    return StepsCall(*whole, [], _nothing, caches, before, points, held, step)


def _nothing(nodes: Sequence[int]) -> None:
    """Read nothing: steps need no views of the caches, whose replay this would be."""
