"""What a drafter sees of its target: the head's input, and what some layers returned beside it.

h = what the head saw + T [norm(tap_1) ; norm(tap_2) ; ...]

Norm divides by the root mean square; T is the network's ``tap_proj``.
"""

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
from jaxtyping import Float
from mlx import nn

NORM_EPS = 1e-5

Taps: TypeAlias = Sequence[Float[mx.array, "... D"]] | Float[mx.array, "... T D"] | None


def with_taps(
    network: nn.Module,
    hidden: Float[mx.array, "... D"],
    taps: Taps = (),
) -> Float[mx.array, "... D"]:
    """Return h: what the head saw, with what the tapped layers returned.

    Args:
        network: Its ``tap_proj`` is T; without one it sees no layers.
        hidden: What the head saw.
        taps: What the layers returned at the same tokens, in arrays of their own or in one.
    """
    project = network.get("tap_proj")
    if project is None:
        return hidden
    # Layers' outputs differ in size by hundreds; norms without weights, as T has some.
    beside = taps if isinstance(taps, mx.array) else mx.stack(list(taps or ()), axis=-2)
    normed = mx.fast.rms_norm(beside, None, NORM_EPS).flatten(-2)
    return mx.addmm(hidden[None], normed[None], project.weight.T).squeeze(0)
