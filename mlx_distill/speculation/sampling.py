"""Logits to tokens: the only place where a distribution is shaped and drawn from.

The order of the filters is mlx-lm's (top-p, min-p, top-k, each on the distribution at temperature
1, then the temperature), and the filters are mlx-lm's own, so that a seed aside a text is drawn
from the same law with and without drafting.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_distill.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the most probable token.
        top_p: Draw from the smallest set of tokens with this probability; 1 is all.
        top_k: Draw from this many tokens; 0 is all.
        min_p: Draw from tokens at least this many times as probable as the best; 0 is all.

    Raises:
        InputError: If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        # Below a millionth, float32 cannot hold the scaled logits.
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise InputError(
                f"temperature must be 0 or at least 1e-6, and finite, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k must be a whole number of at least 0, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be between 0 and 1, got {self.min_p}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError if top_k is above the number of tokens there are."""
        if self.top_k > vocab_size:
            raise InputError(
                f"top_k must be at most the vocabulary's {vocab_size} tokens, got {self.top_k}"
            )


def log_probs(logits: Float[mx.array, "... V"]) -> Float[mx.array, "... V"]:
    """Return the normalised log-probabilities, in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def shaped_logits(logits: Float[mx.array, "... V"], sampling: Sampling) -> mx.array:
    """Return logits whose softmax is the distribution that ``sampling`` draws from.

    Tokens that a filter drops are at -inf. Needs a temperature above 0.
    """
    vocab_size = logits.shape[-1]
    if sampling.top_p < 1 or sampling.min_p > 0 or 0 < sampling.top_k < vocab_size:
        logits = log_probs(logits)
    if sampling.top_p < 1:
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = apply_min_p(logits, sampling.min_p)
    if 0 < sampling.top_k < vocab_size:
        logits = apply_top_k(logits, sampling.top_k)
    logits = logits.astype(mx.float32)
    return logits if sampling.temperature == 1 else logits * (1 / sampling.temperature)


def sample(
    logits: Float[mx.array, "... V"], sampling: Sampling, key: mx.array | None = None
) -> Int[mx.array, "..."]:
    """Return a token per row of logits.

    Args:
        logits: Not normalised.
        sampling: The law; at temperature 0 the most probable token is taken.
        key: Of the random numbers; needed above temperature 0.
    """
    if sampling.temperature == 0:
        if logits.dtype != mx.float32:
            # mlx-lm normalises before it takes the best, and in half precision that makes ties.
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return mx.random.categorical(shaped_logits(logits, sampling), key=key).astype(mx.int32)


def sample_nodes(
    logits: Float[mx.array, "... N V"],
    depths: Int[mx.array, " N"],
    max_depth: int,
    sampling: Sampling,
    key: mx.array | None = None,
) -> Int[mx.array, "... N"]:
    """Return a token per node of a tree; nodes of the same depth share their random numbers.

    A walk reaches one node of a depth at the most, and the numbers of that depth have no part in
    how it got there. So it draws as if every node had numbers of its own, which would take twice
    the time for 8 nodes of 4 depths.

    Args:
        logits: Not normalised; leading axes are independent draws.
        depths: Distance of each node from the root.
        max_depth: No node is deeper than this.
        sampling: The law.
        key: Of the random numbers; needed above temperature 0.
    """
    if sampling.temperature == 0:
        return sample(logits, sampling)
    shape = (*logits.shape[:-2], max_depth + 1, logits.shape[-1])
    noise = mx.take(mx.random.gumbel(shape, key=key), depths, axis=-2)
    return mx.argmax(shaped_logits(logits, sampling) + noise, axis=-1).astype(mx.int32)
