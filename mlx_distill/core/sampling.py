"""Logits to tokens: the only place where a distribution is shaped and drawn from.

The order of the filters is mlx-lm's (top-p, min-p, top-k, each on the distribution at temperature
1, then the temperature), and the filters are mlx-lm's own, so that a text is drawn from the law
that mlx-lm draws it from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_sampler

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

    def mlx_lm_sampler(self, vocab_size: int) -> Callable[[mx.array], mx.array]:
        """Return mlx-lm's own sampler of this law; it refuses a top_k of all tokens."""
        top_k = self.top_k if self.top_k < vocab_size else 0
        return make_sampler(self.temperature, self.top_p, self.min_p, 1, top_k)


GREEDY = Sampling()


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
    logits: Float[mx.array, "... V"],
    sampling: Sampling,
    noise: Float[mx.array, "... V"] | None = None,
) -> Int[mx.array, "..."]:
    """Return a token per row of logits: the best one after the noise is added.

    The best of logits and independent Gumbel noise is a draw from their softmax.

    Args:
        logits: Not normalised.
        sampling: The law; at temperature 0 the most probable token is taken.
        noise: Gumbel noise; needed above temperature 0.
    """
    if logits.dtype != mx.float32:
        # mlx-lm normalises first, and in half precision that rounds: it makes ties, for example.
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    assert noise is not None
    return mx.argmax(shaped_logits(logits, sampling) + noise, axis=-1).astype(mx.int32)


class TextNoise:
    """The random numbers of one text: row n of Gumbel noise decides its n-th token.

    The text is thereby a function of the model and the key alone: token n is the best of the
    model's logits after the tokens before it and row n, however many calls that took and whatever
    was drafted. So drafts may be made in sight of the noise: a drafter that adds the same rows to
    its own logits guesses the draws themselves, not only their law.

    Args:
        key: Of the random numbers.
        vocab_size: Length of a row.

    Source:
        Daliri, Musco and Suresh 2024, arXiv:2408.07978.
    """

    def __init__(self, key: mx.array, vocab_size: int):
        self.vocab_size = vocab_size
        # About a megabyte, or 16 rows. It must not depend on who asks, or the rows would.
        self.block_rows = max(16, 2**18 // vocab_size)
        self._key = key
        self._blocks: list[mx.array] = []
        self._first = 0

    def rows(self, start: int, count: int) -> Float[mx.array, "N V"]:
        """Return ``count`` rows from row ``start`` on; a text never asks for earlier ones again."""
        size = self.block_rows
        self._extend(start + count)
        while self._first + size <= start:
            self._blocks.pop(0)
            self._first += size
        begin = start - self._first
        parts = [
            block[max(0, begin - place) : begin + count - place]
            for place, block in zip(range(0, begin + count, size), self._blocks, strict=False)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _extend(self, end: int) -> None:
        """Make the blocks before row ``end``."""
        while self._first + len(self._blocks) * self.block_rows < end:
            self._key, key = mx.random.split(self._key)
            block = mx.random.gumbel((self.block_rows, self.vocab_size), key=key)
            mx.async_eval(block)
            self._blocks.append(block)
