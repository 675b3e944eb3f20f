"""Recurrent states of several texts in one layer: a row each.

A state is what came of all tokens of its text, so it grows with nothing, and cannot be cut: what
was accepted is run through the mixer once more (``recurrent.rows``), for texts of equally long
paths together. The last path of each text can be taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_distill.target.batch.layout import Paths, RowsLayout
from mlx_distill.target.layer_cache import LayerCache
from mlx_distill.target.recurrent.view import StatesView

States = list[mx.array | None]


@dataclass(frozen=True)
class Undo:
    """The last path of a text.

    Args:
        view: Of the call that it came of.
        text: Its number there.
        start: How many tokens the text had before.
        path: Its nodes, root first.
    """

    view: "StateRowsView"
    text: int
    start: int
    path: Sequence[int]

    def states(self, length: int) -> States:
        """Return the states when the text had so many tokens."""
        return self.view.after([self.text], [self.path[: length - self.start]])


@dataclass(frozen=True)
class Content:
    """What rows hold; it changes as a whole, whenever an interrupt comes.

    Args:
        states: Of all texts.
        lengths: Of the texts, in tokens.
        undo: Of each text, how its last path is taken back; None for not at all.
    """

    states: States
    lengths: tuple[int, ...]
    undo: tuple[Undo | None, ...]


class StateRows:
    """The rows of one layer.

    Args:
        content: What they hold.
    """

    def __init__(self, content: Content):
        self.content = content

    @classmethod
    def of(cls, cache: ArraysCache, lengths: Sequence[int]) -> "StateRows":
        """Return the rows of a cache with the states behind so many texts."""
        return cls(Content(list(cache.cache), tuple(lengths), (None,) * len(lengths)))

    def join(self, other: "StateRows") -> None:
        """Add the rows of other texts below."""
        one, two = self.content, other.content
        states = [_below(pair) for pair in zip(one.states, two.states, strict=True)]
        self.content = Content(states, one.lengths + two.lengths, one.undo + two.undo)

    def take(self, texts: Sequence[int]) -> "StateRows":
        """Return the rows of some texts."""
        content = self.content
        lengths = tuple(content.lengths[text] for text in texts)
        undo = tuple(content.undo[text] for text in texts)
        return StateRows(Content(taken(content.states, texts), lengths, undo))

    def give(self, text: int, length: int, cache: LayerCache) -> None:
        """Let a text's cache hold the states behind its first ``length`` tokens.

        Those are all of them, or some of its last path.
        """
        content = self.content
        undo, now = content.undo[text], content.lengths[text]
        if length == now or undo is None:
            assert length == now
            states = taken(content.states, [text])
        else:
            states = undo.states(length)
        cache.cache = [None if x is None else mx.contiguous(x) for x in states]

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed."""
        return [x for x in self.content.states if x is not None]


class StateRowsView(StatesView):
    """Stands in for a layer's cache of states during a call.

    Args:
        rows: The layer's rows.
        layout: What the call's layers share.
    """

    def __init__(self, rows: StateRows, layout: RowsLayout):
        super().__init__(rows.content.states, layout)
        self.rows = rows

    def commit(self, paths: Paths) -> None:
        """Let each text's states be those after its accepted path."""
        old, by_length = self.rows.content, dict[int, list[int]]()
        for text, path in enumerate(paths.paths):
            by_length.setdefault(len(path), []).append(text)
        groups = by_length.values()
        parts = [self.after(texts, [paths.paths[text] for text in texts]) for texts in groups]
        order = [text for texts in groups for text in texts]
        states = [_below(column) for column in zip(*parts, strict=True)]
        states = taken(states, sorted(range(len(order)), key=order.__getitem__))
        both = enumerate(zip(paths.lengths, paths.paths, strict=True))
        undo = tuple(
            Undo(self, text, length, tuple(path)) if path else old.undo[text]
            for text, (length, path) in both
        )
        self.rows.content = Content(states, paths.lengths_after, undo)

    def after(self, texts: Sequence[int], paths: Sequence[Sequence[int]]) -> States:
        """Return the states of some texts after paths that are equally long."""
        num_nodes = self.layout.num_nodes
        if paths[0] and num_nodes == 1:
            return taken(self.line.cache, texts)
        states = self.fresh()
        states.cache = taken(states.cache, texts)
        if paths[0]:
            nodes = [
                [text * num_nodes + node for node in path]
                for text, path in zip(texts, paths, strict=True)
            ]
            for call in self.calls:
                call.replay(nodes, states)
        return states.cache


def taken(states: States, texts: Sequence[int]) -> States:
    """Return the rows of some texts."""
    if states and states[0] is not None and list(texts) == list(range(states[0].shape[0])):
        return list(states)
    places = mx.array(list(texts))
    return [None if x is None else x[places] for x in states]


def _below(states: Sequence[mx.array | None]) -> mx.array | None:
    """Return states of some texts below those of others."""
    there = [x for x in states if x is not None]
    if len(there) < 2:
        return there[0] if there else None
    return mx.concatenate(there)
