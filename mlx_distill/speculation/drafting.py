"""The next drafts of several texts: together where their drafter can, each by itself elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_distill.core.draft import best_first_of_all
from mlx_distill.drafters.protocol import DraftPlan, SharesDrafts
from mlx_distill.speculation.cycle import Cycle, accept_next
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.speculation.phases import phase


@dataclass
class Wanted:
    """A draft that is to follow a cycle.

    Args:
        decoding: The text.
        cycle: What it follows.
        plan: Its shape.
        noise: Returns the noise of the first so many tokens behind the root.
    """

    decoding: Decoding
    cycle: Cycle
    plan: DraftPlan | None
    noise: Callable[[int], mx.array | None]

    @property
    def kind(self) -> tuple[object, ...] | None:
        """What texts have in common that can be drafted for together; None by itself."""
        state, plan = self.decoding.state, self.plan
        if plan is None or plan.tree != "best-first" or not isinstance(state, SharesDrafts):
            return None
        shape = plan.beam_width, plan.draft_length  # the trees may differ in size
        return id(state.drafter), *shape, self.decoding.noise is None

    def alone(self) -> None:
        """Draft for this text alone."""
        assert self.cycle.root is not None
        self.cycle.draft = self.decoding.draft(self.cycle.root, self.plan, self.noise)


def next_draft(decoding: Decoding, cycle: Cycle) -> Wanted:
    """Let a drafter know what a cycle makes text; return the draft that is to follow."""
    with mx.stream(generation_stream):
        return Wanted(decoding, cycle, decoding.plan(), accept_next(decoding, cycle))


def draft_all(wanted: Sequence[Wanted]) -> None:
    """Send the drafts that follow the cycles of several texts after them."""
    kinds: dict[tuple[object, ...] | None, list[Wanted]] = {}
    for one in wanted:
        kinds.setdefault(one.kind, []).append(one)
    with mx.stream(generation_stream):
        for kind, group in kinds.items():
            if kind is None or len(group) == 1:
                for one in group:
                    one.alone()
            else:
                _draft_together(group)


def _draft_together(wanted: Sequence[Wanted]) -> None:
    contexts, roots, noise, nodes = [], [], [], []
    plan = wanted[0].plan
    assert plan is not None
    for one in wanted:
        state, root = one.decoding.state, one.cycle.root
        assert isinstance(state, SharesDrafts)
        assert root is not None
        assert one.plan is not None
        nodes.append(one.plan.nodes)
        contexts.append(state.context(root))
        roots.append(root)
        noise.append(one.decoding.in_sight(one.noise(plan.draft_length)))
    rows = None if noise[0] is None else mx.stack(noise)
    with phase("draft", roots, rows) as made:
        state = wanted[0].decoding.state
        assert isinstance(state, SharesDrafts)
        draft = state.drafter.draft_together(contexts, mx.concatenate(roots), plan, rows)
        made(draft)
    with phase("tree") as made:
        trees = best_first_of_all(draft, nodes)
        made(trees)
    for one, tree in zip(wanted, trees, strict=True):
        one.cycle.draft = tree
    mx.async_eval([[tree.tokens, tree.parents, tree.mask, tree.depths] for tree in trees])
