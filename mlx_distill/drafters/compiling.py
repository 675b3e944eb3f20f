"""Drafts that are compiled by their shapes, once a shape has proved to be used.

A compiled draft has a few hundred microseconds less of small operations. But compiling a shape can
take seconds where nothing was ever compiled, and many milliseconds where that is only to be traced;
a shape that a planner tries for a few cycles would never bring them in.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import SERIAL
from mlx_distill.kernels.choice import chosen

# Of shapes that are kept compiled, the ones used last; with noise and without, each is two.
MOST_COMPILED = 32
# From this use on, a shape is compiled.
COMPILED_AT = 5

Arrays = tuple[mx.array, mx.array, mx.array, mx.array]


class CompiledDrafts:
    """Functions that draft, one for every shape of draft and more that tells them apart.

    Nothing of the law of sampling is compiled in, so that another one compiles nothing.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._uses: Counter[Hashable] = Counter()
        self._at_once = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many are compiled."""
        return len(self._compiled)

    def of(self, kind: Hashable, draft: Callable[..., Any]) -> Callable[..., Any]:
        """Return what drafts, compiled or not yet; it takes arrays.

        Args:
            kind: What tells it from the others.
            draft: It, of a number that it has no use for and of arrays.
        """
        kind = (kind, chosen("beam_step"))  # what is compiled holds one or the other
        with self._lock:
            self._uses[kind] += 1
            if self._uses[kind] < COMPILED_AT and not self._at_once:
                return partial(draft, 0)
            # A function that is freed may leave its address to the next one, and MLX finds what it
            # has compiled by that; a number that is new every time tells them apart.
            found = self._compiled.pop(kind, None) or partial(mx.compile(draft), next(SERIAL))
            self._compiled[kind] = found  # behind the others, as the last one used
            if len(self._compiled) > MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
        return found

    def forget(self, at_once: bool = False) -> None:
        """Compile anew what is used again, since what is drafted with has changed.

        Args:
            at_once: Whether every shape is compiled at its first use from now on.
        """
        with self._lock:
            self._compiled.clear()
            self._at_once |= at_once
