"""Logits to tokens: the only place where a distribution is shaped and drawn from.

The order of the filters is mlx-lm's (top-p, min-p, top-k, each on the distribution at temperature
1, then the temperature), and they keep the tokens that mlx-lm's keep (``filters``), so that a text
is drawn from the law that mlx-lm draws it from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import mlx.core as mx
from jaxtyping import Bool, Float, Int
from mlx_lm.sample_utils import make_sampler

from mlx_distill.core.filters import can_filter_fast, filter_exactly, filter_fast
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, check_fields

# Below a millionth, float32 cannot hold the scaled logits; far above 1, all are alike.
Temperature = Annotated[float, Between(1e-6, 100, also=0)]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the most probable token.
        top_p: Draw from the smallest set of tokens with this probability; 1 is all.
        top_k: Draw from this many tokens, at most the whole vocabulary; 0 is all.
        min_p: Draw from tokens at least this many times as probable as the best; 0 is all.

    Raises:
        InputError: If a value is out of its range.
    """

    temperature: Temperature = 0.0
    top_p: Annotated[float, Between(above=0, high=1)] = 1.0
    top_k: Annotated[int, Between(0, 2**31 - 1)] = 0
    min_p: Annotated[float, Between(0, 1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def filters(self, vocab_size: int) -> bool:
        """Return whether any token of a vocabulary of this size can be dropped."""
        return self.top_p < 1 or self.min_p > 0 or 0 < self.top_k < vocab_size

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


def shaped_logits(logits: Float[mx.array, "... V"], sampling: Sampling) -> mx.array:
    """Return logits whose softmax is the distribution that ``sampling`` draws from.

    Tokens that a filter drops are at -inf. Needs a temperature above 0.
    """
    if sampling.filters(logits.shape[-1]):
        logits = filter_exactly(logits, sampling.top_p, sampling.min_p, sampling.top_k)
    return _tempered(logits, sampling)


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
    if sampling.temperature == 0:
        return _best(logits)
    return _drawn(shaped_logits(normalised(logits), sampling), noise)


def sample_fast(
    logits: Float[mx.array, "... V"],
    sampling: Sampling,
    noise: Float[mx.array, "... V"] | None = None,
) -> tuple[Int[mx.array, "..."], Bool[mx.array, "..."] | None]:
    """Return what ``sample`` returns, and where that is certain; None means everywhere.

    Where it is not, the filters would have had to look at more tokens: ask ``sample``. The
    arguments are those of ``sample``.
    """
    if sampling.temperature == 0:
        return _best(logits), None
    shaped, certain = shaped_fast(logits, sampling)
    return _drawn(shaped, noise), certain


def shaped_fast(
    logits: Float[mx.array, "... V"], sampling: Sampling
) -> tuple[Float[mx.array, "... V"], Bool[mx.array, "..."] | None]:
    """Return the logits that ``sample_fast`` draws from, and where these are certain.

    Needs a temperature above 0. The arguments are those of ``sample``.
    """
    vocab_size, logits = logits.shape[-1], normalised(logits)
    fast = can_filter_fast(vocab_size, sampling.top_p, sampling.top_k)
    if not fast or not sampling.filters(vocab_size):
        return shaped_logits(logits, sampling), None
    kept, certain = filter_fast(logits, sampling.top_p, sampling.min_p, sampling.top_k)
    return _tempered(kept, sampling), certain


def _best(logits: mx.array) -> mx.array:
    return _argmax(normalised(logits))


def _drawn(shaped: mx.array, noise: mx.array | None) -> mx.array:
    assert noise is not None
    return _argmax(shaped + noise)


def _argmax(values: mx.array) -> mx.array:
    return mx.argmax(values, axis=-1).view(mx.int32)  # a view: no operation


def normalised(logits: mx.array) -> mx.array:
    """Return half-precision logits as mlx-lm draws from them: normalised, which rounds.

    It makes ties, for example. In float32 the difference is none that counts.
    """
    if logits.dtype == mx.float32:
        return logits
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _tempered(logits: mx.array, sampling: Sampling) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if sampling.temperature == 1 else logits * (1 / sampling.temperature)


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
