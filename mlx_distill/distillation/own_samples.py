"""Drafts that go on with the drafter's own samples, as late in a training.

In decoding the drafter reads what it has drafted itself, and what follows a rejected token is never
used. While it learns, it reads the text, however unlikely it would have drafted that:

    the target wrote   a  b  c  d         a is certain, so it is read in any case
    drawn behind a     b                  what the target wrote: the draft goes on
    drawn behind a b   x                  the draft ends; q(. | a b c) weighs nothing

So what is known of the target, its distributions along its own text, is all that is needed: where a
sample is the text's token, the target's word is known behind it, and where it is another, a draft
would have been rejected. Of a sample it only matters whether it is the text's token, which it is
with the probability that the drafter gives that token.
"""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import log_probs


class Own(NamedTuple):
    """The drafter's own samples along drafts, as far as they matter.

    Args:
        columns: Of the drafter's logits, that of the token which the target chose behind each token
            that a draft reads; -1 where it cannot be drafted.
        draws: From 0 to 1: a sample is that token where its probability is no smaller. With zeros
            every draft reads the text.
    """

    columns: Int[mx.array, "S L"]
    draws: Float[mx.array, "S L"]


def still_drafted(logits: Float[mx.array, "N K"], own: Own, length: int) -> Float[mx.array, " N"]:
    """Return 1 where all that a draft has read is what the target wrote, else 0.

    Args:
        logits: The drafter's, along whole drafts.
        own: Of the same rows.
        length: Of a draft.
    """
    chosen = mx.maximum(own.columns, 0)[:, None]
    probs = mx.exp(mx.take_along_axis(log_probs(logits), chosen, axis=-1)[:, 0])
    taken = own.draws <= mx.where(own.columns < 0, 0.0, probs)
    taken = taken.reshape(-1, length).astype(mx.float32)
    first = mx.ones_like(taken[:, :1])  # the root is certain, and read in any case
    return mx.cumprod(mx.concatenate([first, taken[:, :-1]], axis=1), axis=1).reshape(-1)


def columns_of(token_ids: mx.array | None, vocab_size: int) -> mx.array:
    """Return each token's column of a drafter's logits; -1 where it cannot be drafted."""
    if token_ids is None:
        return mx.arange(vocab_size)
    columns = mx.full((vocab_size,), -1, mx.int32)
    columns[token_ids] = mx.arange(token_ids.size, dtype=mx.int32)
    return columns
