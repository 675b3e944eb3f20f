"""Where a cycle's time goes: the target's calls, the drafter's calls, and all the rest.

The two calls are timed where they happen, within the decoding of whole texts. For that the device
is waited for before and after each of them, so nothing overlaps, and the rest is all that the loop
itself takes: noise, draws, walk, tree, commit, text, and the waiting.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.drafters.protocol import Drafter, DraftPlan, DraftState, Features
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.target.target import Target, TreeCall


@dataclass
class CycleClock:
    """Seconds since it was last reset.

    Args:
        target_s: In the target's calls.
        drafter_s: In the drafter's calls.
        cycles: Number of the target's calls.
    """

    target_s: float = 0.0
    drafter_s: float = 0.0
    cycles: int = 0

    def reset(self) -> None:
        """Start again."""
        self.target_s = self.drafter_s = 0.0
        self.cycles = 0

    @contextmanager
    def watching(self, target: Target) -> Iterator[None]:
        """Time the target's calls meanwhile."""
        verify = target.verify

        def timed(tree: PrefixTree, caches: PromptCache, taps: Sequence[int] = ()) -> TreeCall:
            mx.eval(tree.tokens, tree.mask, tree.depths)
            start = time.perf_counter()
            call = verify(tree, caches, taps)
            mx.eval(call.logits, call.hidden)
            self.target_s += time.perf_counter() - start
            self.cycles += 1
            return call

        target.verify = timed
        try:
            yield
        finally:
            del target.verify  # the method of its class is there again


@dataclass
class TimedDrafter:
    """A drafter whose calls a clock times.

    Args:
        drafter: Drafts.
        clock: Counts.
    """

    drafter: Drafter
    clock: CycleClock

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers that the drafter wants to see."""
        return self.drafter.taps

    def open(self, prompt: mx.array, features: Features) -> "TimedState":
        """Return the state of a new text."""
        return TimedState(self.drafter.open(prompt, features), self.clock)


@dataclass
class TimedState:
    """One text of a timed drafter.

    Args:
        state: The drafter's state.
        clock: Counts.
    """

    state: DraftState
    clock: CycleClock

    def draft(self, root: mx.array, plan: DraftPlan, noise: mx.array | None) -> Draft | None:
        """Return what the drafter drafts."""
        mx.eval(root, *(() if noise is None else (noise,)))
        start = time.perf_counter()
        draft = self.state.draft(root, plan, noise)
        if draft is not None:
            mx.eval(draft.tokens, draft.parents, draft.depths, draft.scores)
        self.clock.drafter_s += time.perf_counter() - start
        return draft

    def accept(self, tokens: mx.array, features: Features) -> None:
        """Hand on what became text."""
        self.state.accept(tokens, features)

    def rewind(self, num_tokens: int) -> None:
        """Hand on what did not."""
        self.state.rewind(num_tokens)
