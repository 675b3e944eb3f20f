"""The noise that draws are made with: a table of rows, or what it takes to make them."""

from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Float, Int


class Keyed(NamedTuple):
    """Gumbel noise that is made where it is used: of a key and a place in the text.

    Args:
        key: Of the random numbers, as ``mx.random.key`` makes it.
        start: The place of row 0.
    """

    key: mx.array
    start: int

    def rows(self, places: Int[mx.array, " N"], vocab_size: int) -> Float[mx.array, "N V"]:
        """Return the noise at places, counted from the start."""
        second = self.key[1] + (places + self.start).astype(mx.uint32)
        keys = mx.stack([mx.broadcast_to(self.key[0], second.shape), second], axis=-1)
        return mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)


Noise: TypeAlias = Float[mx.array, "M V"] | Keyed
