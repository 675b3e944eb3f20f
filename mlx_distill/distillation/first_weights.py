"""The weights with which a recurrent drafter of a target begins to learn.

    logits = H block(P h + S s),   h the context, s the state, which has read W e

H are rows of the target's head, and P h is what that head is given: P is the identity or, where the
head is narrower, the directions that it keeps. Embeddings are often a tenth or a hundredth as large
as h, so what a token says would not be seen beside the context for hundreds of steps: W and S are
scaled by what the target has computed of an answer, W e to a size of 1, S s to that of P h. H is
scaled to logits with a spread of 1, as the target's own are sure of a token that is the root by
then. What this brings is in docs/drafting.md.

Source:
    Mishkin and Matas 2016, "All you need is a good init", arXiv:1511.06422: variances that data
    find.
"""

import math

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.arrays import to_number
from mlx_distill.distillation.drafted_head import start_head
from mlx_distill.drafters.recurrent import RecurrentDrafter


def begin_near(
    network: RecurrentDrafter,
    rows: Float[mx.array, "K G"],
    hidden: Float[mx.array, "N D"],
    embeddings: Float[mx.array, "N E"],
) -> None:
    """Let a drafter begin with its target's head, and with inputs of a size that the head reads.

    Args:
        network: Without context blocks, or with some that add nothing yet; in float32.
        rows: Of the target's head, for the tokens that can be drafted.
        hidden: What that head saw at some tokens of an answer.
        embeddings: Of the tokens that followed these.
    """
    hidden, embeddings = hidden.astype(mx.float32), embeddings.astype(mx.float32)
    reading = start_head(network, rows.astype(mx.float32))
    if network.config.rnn:
        network.rnn_w.weight = _scaled(network.rnn_w.weight, 1.0, network.read(embeddings))
    if reading is None or reading.shape[-1] != hidden.shape[-1] or "input_proj" not in network:
        return
    state_part = network.input_proj.weight[:, hidden.shape[-1] :]
    state = network.advance(network.begin(hidden), network.read(embeddings))
    state_part = _scaled(state_part, _size(hidden @ reading.T), state @ state_part.T)
    network.input_proj.weight = mx.concatenate([reading, state_part], axis=1)
    network.input_proj.bias = mx.zeros_like(network.input_proj.bias)
    logits = network.logits(network.context(hidden), mx.zeros_like(state))
    logits = logits - mx.mean(logits, axis=-1, keepdims=True)
    network.head.weight = _scaled(network.head.weight, 1.0, logits)


def _scaled(weight: mx.array, wanted: float, made: mx.array) -> mx.array:
    """Return a weight with which what it made has a root mean square of ``wanted``."""
    size = _size(made)
    known = 0 < size < math.inf and 0 < wanted < math.inf
    return weight * (wanted / size) if known else weight


def _size(x: mx.array) -> float:
    """Return the root mean square."""
    return to_number(mx.sqrt(mx.mean(mx.square(x))))
