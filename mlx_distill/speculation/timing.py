"""Where a cycle's time goes: the target's calls, the drafter's calls, and all the rest.

The two calls are timed where they happen, within the decoding of whole texts. For that the device
is waited for before and after each of them, so nothing overlaps, and the rest is all that the loop
itself takes: noise, draws, walk, tree, commit, text, and the waiting.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_distill.drafters.protocol import Drafter
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

        def timed(
            tokens: mx.array, mask: mx.array, depths: mx.array, max_depth: int, caches: list[Any]
        ) -> TreeCall:
            mx.eval(tokens, mask, depths)
            start = time.perf_counter()
            call = verify(tokens, mask, depths, max_depth, caches)
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

    def draft(self, *arguments: Any) -> Any:
        """Return what the drafter drafts."""
        mx.eval([part for part in arguments if isinstance(part, mx.array)])
        start = time.perf_counter()
        levels = self.drafter.draft(*arguments)
        mx.eval(levels.tokens, levels.parents, levels.scores)
        self.clock.drafter_s += time.perf_counter() - start
        return levels
