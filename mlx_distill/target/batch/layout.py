"""What the layers share of one call of several texts: where nodes lie, and what becomes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Int, Integer

from mlx_distill.core.forest import Packing
from mlx_distill.target.batch.key_rows import KeyRows


@dataclass(frozen=True)
class RowsLayout:
    """What every layer of one call shares.

    Args:
        mask: The trees' masks; None where every text reads one token.
        depths: Of the nodes.
        lengths: How many tokens each text has before them.
        max_depth: No node is deeper than this.
        packing: How the model is given the nodes as a list; None where it is given a row per text.
    """

    mask: Bool[mx.array, "B N N"] | None
    depths: Int[mx.array, "B N"]
    lengths: tuple[int, ...]
    max_depth: int = 0
    packing: Packing | None = None
    masks: dict[object, mx.array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_nodes(self) -> int:
        """Nodes of a text, padding included."""
        return self.depths.shape[1]

    @property
    def num_texts(self) -> int:
        """How many texts have trees."""
        return self.depths.shape[0]

    @property
    def in_line(self) -> bool:
        """Whether every text reads one token; of nodes, it is not asked."""
        return self.mask is None

    @property
    def longest(self) -> int:
        """The longest text before the call."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> Int[mx.array, " B"]:
        """Where each text's first node is."""
        return mx.array(self.lengths, mx.int32)

    @cached_property
    def positions(self) -> Int[mx.array, "B N"]:
        """Position of every node in its text."""
        return self.depths + self.starts[:, None]

    @property
    def offset(self) -> Int[mx.array, "..."]:
        """The positions as the models' ropes take them: of single tokens, one per text."""
        if self.packing is not None:
            return self.packing.packed(self.positions)
        return self.starts if self.num_nodes == 1 else self.positions

    @cached_property
    def paths(self) -> Int[mx.array, "R S"]:
        """The nodes from the root to each node, numbered through all texts; behind it, any."""
        assert self.mask is not None
        here = self.depths[:, None] == mx.arange(self.max_depth + 1)[:, None]
        nodes = mx.argmax(self.mask[:, :, None] & here[:, None], axis=-1)
        before = mx.arange(self.num_texts) * self.num_nodes
        return (nodes + before[:, None, None]).flatten(0, 1).astype(mx.int32)

    def starts_of(self, nodes: Sequence[int] | None = None) -> Int[mx.array, " R"]:
        """Return where the texts of nodes begin that have a row each; None for all nodes."""
        if nodes is None:
            return mx.repeat(self.starts, self.num_nodes)
        return self.starts[mx.array([node // self.num_nodes for node in nodes])]

    def slots(self, rows: KeyRows) -> Integer[mx.array, " R"]:
        """Return where single tokens lie in the rows of a layer."""
        key = ("slots", rows.parts[0].shape[1], rows.num_slots, rows.ring)
        if key not in self.masks:
            self.masks[key] = rows.slots_of(list(enumerate(self.lengths)))
        return self.masks[key]


@dataclass(frozen=True)
class Paths:
    """What becomes text of a call, and where it lies then.

    Args:
        lengths: Of the texts before the call.
        paths: The accepted nodes of each text, root first.
    """

    lengths: tuple[int, ...]
    paths: Sequence[Sequence[int]]
    known: dict[object, mx.array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def lengths_after(self) -> tuple[int, ...]:
        """Of the texts with what they have accepted."""
        both = zip(self.lengths, self.paths, strict=True)
        return tuple(length + len(path) for length, path in both)

    @cached_property
    def nodes(self) -> tuple[Int[mx.array, " T"], Int[mx.array, " T"]]:
        """The text and the number of every accepted node."""
        nodes = [(text, node) for text, path in enumerate(self.paths) for node in path]
        texts, numbers = (mx.array(list(x)) for x in zip(*nodes, strict=True))
        return texts, numbers

    def slots(self, rows: KeyRows) -> Integer[mx.array, " R"]:
        """Return where they belong in the rows of a layer."""
        key = rows.parts[0].shape[1], rows.num_slots, rows.ring
        if key not in self.known:
            places = [
                (text, length + step)
                for text, (length, path) in enumerate(zip(self.lengths, self.paths, strict=True))
                for step in range(len(path))
            ]
            self.known[key] = rows.slots_of(places)
        return self.known[key]
