"""Where the tokens of a text lie in its row: side by side, or around a ring.

Of a sliding window only the latest tokens are needed, so their slots follow each other around a
ring; each text is somewhere else on its own. What a slot holds follows from the text's length and
the slot's number, so masks are made of positions (``target.window`` says more).

    keep 1, ring of 4      slots   0 | 1  2  3  4        a text of 8 tokens: 0, then 4 to 7
                           hold    0 | 5  6  7  4
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from mlx_distill.target.window import ROOM

END = 2**31 - 1


@dataclass(frozen=True)
class Ring:
    """The slots of a layer's rows.

    Args:
        keep: The first so many tokens of a text always stay.
        size: Tokens in the window, those among them.
        capacity: Slots of a row at the most.
    """

    keep: int = 0
    size: int = END
    capacity: int = END

    @classmethod
    def of_window(cls, keep: int, size: int) -> "Ring":
        """Return the ring of a sliding window, with room for trees."""
        return cls(keep, size, size + ROOM)

    @property
    def is_endless(self) -> bool:
        """Whether every token stays."""
        return self.size == END

    @property
    def room(self) -> int:
        """Slots beside the window."""
        return self.capacity - self.size

    def with_room(self, num_slots: int) -> "Ring":
        """Return a ring with at least so many slots beside the window."""
        return self if self.room >= num_slots else replace(self, capacity=self.size + num_slots)

    def slots(self, positions: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Return where tokens lie."""
        turn = self.capacity - self.keep
        return np.where(
            positions < self.keep, positions, self.keep + (positions - self.keep) % turn
        )

    def used(self, num_tokens: int) -> int:
        """Return how many slots a text of so many tokens takes."""
        return min(num_tokens, self.capacity)

    def present(self, num_tokens: int) -> list[int]:
        """Return the positions of the tokens that the row of a text of so many holds."""
        stay = min(self.keep, num_tokens)
        first = max(stay, num_tokens - (self.capacity - self.keep))
        return [*range(stay), *range(first, num_tokens)]

    def window(self, num_tokens: int) -> list[int]:
        """Return the positions of the tokens in the window of a text of so many."""
        stay = min(self.keep, num_tokens)
        first = max(stay, num_tokens - (self.size - stay))
        return [*range(stay), *range(first, num_tokens)]

    def held(
        self, num_slots: int, lengths: Int[mx.array, " B"], longest: int
    ) -> tuple[Int[mx.array, "..."], Bool[mx.array, "..."]]:
        """Return the position of the token in every slot, and whether there is one.

        Args:
            num_slots: The first so many.
            lengths: Of the texts.
            longest: The greatest of them.
        """
        slots = mx.arange(num_slots)
        if longest <= self.capacity:
            return slots, slots < lengths[:, None]
        last = lengths[:, None] - 1
        around = last - (last - slots) % (self.capacity - self.keep)
        stays = slots < self.keep
        there = mx.where(stays, slots <= last, around >= self.keep)
        return mx.where(stays, slots, around), there

    def reach(self, window: int | None) -> int | None:
        """Return over how many tokens a token attends, of a layer that asks for a window."""
        if self.is_endless:
            return window
        return min(window or self.size, self.size) if self.keep == 0 else self.size - self.keep


ENDLESS = Ring()
