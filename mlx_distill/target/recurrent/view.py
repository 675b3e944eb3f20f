"""One layer's recurrent states seen by the nodes of a tree.

A state is what came of all tokens before, and there is one of it: nodes cannot be put into it and
most of them taken out again, as with keys. So it stays as it is during the call. The *mixer*, the
module that is handed the states, says what every node sees (``mixers``), and afterwards the states
are remade of the accepted nodes, by what the mixer computed for them already.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_distill.target.batch.layout import RowsLayout
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.watching import Call

Arguments = tuple[object, ...]
Named = dict[str, object]


class MixerCall(Protocol):
    """One call of a mixer on the nodes of a tree, and what it leaves behind."""

    def run(self, call: Call, args: Arguments, kwargs: Named) -> object:
        """Return what the mixer says of every node; ``call`` is its own code."""
        ...

    def replay(self, paths: Sequence[Sequence[int]], states: ArraysCache) -> None:
        """Let the states, which are those before the call, be those after paths of nodes.

        There is a row of states for each of the paths, which are equally long. The nodes of several
        texts are numbered through.
        """
        ...


MixedLayout = TreeLayout | RowsLayout


class StatesView:
    """Stands in for a cache of states during a call, until it is told what is kept.

    Args:
        states: Those before the call.
        layout: Where the nodes lie.
    """

    # No text is padded.
    lengths = left_padding = None

    def __init__(self, states: Sequence[mx.array | None], layout: MixedLayout):
        self.before = list(states)
        self.layout = layout
        self.line = self.fresh()  # what nodes in a line are read into
        self.calls: list[MixerCall] = []

    def fresh(self) -> ArraysCache:
        """Return a cache with the states before the call, for a mixer to change."""
        states = ArraysCache(len(self.before))
        states.cache = list(self.before)
        return states

    def make_mask(self, num_tokens: int) -> None:
        """Return no mask: it would tell padding from text."""


class RecurrentTreeCache(StatesView):
    """A cache of recurrent states, for one tree call.

    Args:
        base: mlx-lm's cache of them.
        layout: The tree.
    """

    def __init__(self, base: ArraysCache, layout: TreeLayout):
        super().__init__(base.cache, layout)
        self.base = base
        self.path: list[int] = []

    def commit(self, path: list[int]) -> bool:
        """Let the states be those after the accepted path."""
        self.path = path
        return self.rewind(len(path))

    def rewind(self, num_tokens: int) -> bool:
        """Keep the first ``num_tokens`` of the committed path; 0 forgets the whole tree."""
        path, states = self.path[:num_tokens], self.fresh()
        if self.layout.in_line and num_tokens == self.layout.num_nodes:
            states.cache = list(self.line.cache)
        elif path:
            for call in self.calls:
                call.replay([path], states)
        self.base.cache = states.cache
        return True


def replaced(args: Arguments, kwargs: Named, old: object, new: object) -> tuple[Arguments, Named]:
    """Return the arguments of a call with one in another's place."""

    def change(x: object) -> object:
        return new if x is old else x

    return tuple(map(change, args)), {name: change(x) for name, x in kwargs.items()}
