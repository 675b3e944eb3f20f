"""Where drafts have the tokens of the text that they were made for.

A draft holds the tree of all that its search met. Every shape of tree that could be verified is a
part of it, so one search tells what each of them would have brought:

    text  sat on the      draft  sat(1) - on(3)      3 nodes: root, sat, ran   1 token of the text
                                 ran(2)              4 nodes: and on           2 tokens
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from mlx_distill.core.draft import Draft, likelihood
from mlx_distill.drafters.protocol import DraftPlan

NOWHERE = -1  # the index of a node that there is not


@dataclass
class Met:
    """What the drafts of a text's places have of it.

    Args:
        parents: Of every node.
        depths: Of every node.
        likely: Of every node, as ``likelihood`` has it.
        nodes: The node that has the d-th token of the text behind a place; NOWHERE if none has.
    """

    parents: Int[np.ndarray, "S N"]
    depths: Int[np.ndarray, "S N"]
    likely: np.ndarray
    nodes: Int[np.ndarray, "S L"]
    _ranks: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, draft: Draft, follows: Int[np.ndarray, "S L"]) -> "Met":
        """Return what the drafts of many places have; this reads them.

        Args:
            draft: With an axis for the places in front.
            follows: The tokens behind every place; -1 behind the text's end.
        """
        likely = likelihood(draft.scores, draft.depths)
        tokens, parents, depths = map(np.array, (draft.tokens, draft.parents, draft.depths))
        node, length = np.zeros(len(tokens), np.int64), min(draft.max_depth, follows.shape[1])
        nodes = np.full((len(tokens), draft.max_depth), NOWHERE)
        inner = np.arange(tokens.shape[1]) > 0
        for depth in range(length):
            follow = follows[:, depth, None]
            has = (tokens == follow) & (parents == node[:, None]) & inner & (follow >= 0)
            node = np.where(has.any(axis=1), has.argmax(axis=1), NOWHERE)
            nodes[:, depth] = node
        return cls(parents, depths, np.array(likely), nodes)

    @classmethod
    def nothing(cls, num_places: int) -> "Met":
        """Return what a drafter has that had nothing to say."""
        none = np.zeros((num_places, 1), np.int64)
        return cls(none, none, none.astype(np.float32), none + NOWHERE)

    @staticmethod
    def joined(parts: "list[Met]") -> "Met":
        """Return several places' drafts as one; smaller ones are filled up with copies of roots."""

        def stacked(name: str, filler: float | int) -> np.ndarray:
            arrays = [getattr(part, name) for part in parts]
            widest = max(array.shape[1] for array in arrays)
            return np.concatenate(
                [
                    np.pad(x, ((0, 0), (0, widest - x.shape[1])), constant_values=filler)
                    for x in arrays
                ]
            )

        return Met(
            stacked("parents", 0),
            stacked("depths", 0),
            stacked("likely", -np.inf),
            stacked("nodes", NOWHERE),
        )

    def accepted(self, plan: DraftPlan) -> Int[np.ndarray, " S"]:
        """Return how many tokens of the text the tree of a plan has, at every place."""
        if plan.tree == "beam":
            chosen = self.on_beams(plan.draft_length)
        else:
            chosen = self.ranks(plan.draft_length) < plan.nodes
        nodes = self.nodes[:, : plan.draft_length]
        inside = np.take_along_axis(chosen, np.maximum(nodes, 0), axis=1) & (nodes != NOWHERE)
        return inside.sum(axis=1)

    def num_nodes(self, plan: DraftPlan) -> Int[np.ndarray, " S"]:
        """Return how many nodes would be verified at every place."""
        if plan.tree == "beam":
            return self.on_beams(plan.draft_length).sum(axis=1)
        real = (self.depths <= plan.draft_length) & (self.likely > -np.inf)
        return np.minimum(real.sum(axis=1), plan.nodes)

    def ranks(self, length: int) -> Int[np.ndarray, "S N"]:
        """Return how many nodes are likelier than each, of those that are no deeper."""
        if length not in self._ranks:
            likely = np.where(self.depths <= length, self.likely, -np.inf)
            order = np.argsort(-likely, axis=1, kind="stable")
            ranks = np.empty_like(order)
            np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
            self._ranks[length] = ranks
        return self._ranks[length]

    def on_beams(self, length: int) -> np.ndarray:
        """Return which nodes lie on beams of this length."""
        length = min(length, self.nodes.shape[1])  # some drafts end before
        on = (self.depths == length) & (self.likely > -np.inf)
        for _ in range(length):
            above = np.where(on, self.parents, 0)
            on = on.copy()
            np.put_along_axis(on, above, True, axis=1)
        on[:, 0] = True
        return on
