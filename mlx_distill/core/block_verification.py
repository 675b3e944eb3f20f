"""Block verification: a chain that was drawn from a drafter's own law, judged as a whole.

    drafted   A  B  C      as likely as the target's law makes it, against the drafter's   w
    accepted  A  B         the longest beginning whose coin falls in its favour
    emitted         X      of what the target's law has more than the drafter's there

A token that the target finds unlikely is made up for by others that it finds likely, so that no
scheme accepts more of such a chain, token by token least of all. The text has the target's law to
the last digit; which text it is depends on what was drafted, so its random numbers are used once
and have no place in the text.

Source:
    Sun et al. 2024, arXiv:2403.10444, algorithm 2.
"""

import math

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from mlx_distill.arrays import row_sum
from mlx_distill.core.sampling import (
    Sampling,
    TextNoise,
    normalised,
    shaped_fast,
    shaped_logits,
)

MOST_COINS = 64  # one per drafted token
NO_TOKEN = -1  # in the place of one that was rejected: nothing that can be drawn


class OnceNoise:
    """Random numbers of a text that are each used once, whatever they come to.

    Args:
        key: Of the random numbers.
        vocab_size: The target's.
    """

    def __init__(self, key: mx.array, vocab_size: int):
        of_rows, of_coins = mx.random.split(key)
        self._rows, self._coins = TextNoise(of_rows, vocab_size), TextNoise(of_coins, MOST_COINS)
        self._taken = self._tossed = 0

    def rows(self, count: int) -> Float[mx.array, "N V"]:
        """Return rows of Gumbel noise that nobody was given before."""
        self._taken += count
        return self._rows.rows(self._taken - count, count)

    def coins(self, count: int) -> Float[mx.array, " N"]:
        """Return numbers between 0 and 1 that nobody was given before."""
        self._tossed += 1
        (row,) = self._coins.rows(self._tossed - 1, 1)
        return mx.exp(-mx.exp(-row[:count]))


def judge(
    logits: Float[mx.array, "N V"],
    laws: Float[mx.array, "L V"],
    tokens: Int[mx.array, " N"],
    sampling: Sampling,
    noise: OnceNoise,
    exactly: bool = False,
) -> tuple[Int[mx.array, ""], Int[mx.array, " 1"], Bool[mx.array, ""] | None]:
    """Return how many drafted tokens are accepted, the token behind them, and if that is certain.

    Args:
        logits: The target's, at the root and behind each of the L drafted tokens.
        laws: Logits whose softmax each of these was drawn from.
        tokens: The root and the drafted ones.
        sampling: How the target's tokens are drawn.
        noise: Random numbers; the drafts were not made in sight of them.
        exactly: Whether filters look at all tokens. Else it may be uncertain which they keep; None
            says that it is not.
    """
    if exactly:
        shaped, certain = shaped_logits(normalised(logits), sampling), None
    else:
        shaped, certain = shaped_fast(logits, sampling)
    coins, (row,) = noise.coins(laws.shape[0]), noise.rows(1)
    length, law = verdict(probabilities(shaped), probabilities(laws), tokens[1:], coins)
    token = mx.argmax(mx.log(law) + row, keepdims=True).astype(mx.int32)
    return length, token, None if certain is None else certain.all()


def verdict(
    p: Float[mx.array, "N V"],
    q: Float[mx.array, "L V"],
    tokens: Int[mx.array, " L"],
    coins: Float[mx.array, " L"],
) -> tuple[Int[mx.array, ""], Float[mx.array, " V"]]:
    """Return how many tokens are accepted, and the law of the one behind them, not normalised.

    Args:
        p: The target's law at the root and behind each token.
        q: The drafter's, which each token was drawn from.
        tokens: The chain.
        coins: Uniform between 0 and 1; the i-th accepts the first i + 1 tokens.
    """
    accepts, rests = acceptance(p, q, tokens)
    count = tokens.size
    length = mx.where(coins < accepts, mx.arange(1, count + 1), 0).max()
    rest = rests[mx.minimum(length, count - 1)]
    # Where the target has nothing more than the drafter, the chance to stop is that of rounding.
    stops = (length < count) & (rest.max() > 0)
    return length, mx.where(stops, rest, p[length])


def acceptance(
    p: Float[mx.array, "N V"], q: Float[mx.array, "L V"], tokens: Int[mx.array, " L"]
) -> tuple[Float[mx.array, " L"], Float[mx.array, "L V"]]:
    """Return how likely the coin of each token is to accept it, and the laws of what comes instead.

    The latter are of the root and all tokens but the last, and not normalised. The arguments are
    those of ``verdict``. Where the drafter's law is no numbers, as that of damaged weights, nothing
    is accepted from there on, and what comes instead is drawn from the target's law.
    """
    at = tokens[:, None]
    drawn = mx.take_along_axis(q, at, 1)
    lost = mx.cummax(mx.isnan(drawn).astype(mx.int32), axis=0) > 0
    q = mx.where(lost, 0, q)
    ratios = mx.log(mx.take_along_axis(p[:-1], at, 1) / drawn)
    ratios = mx.where(lost, -mx.inf, ratios)[:, 0]
    # w of a token is the least of 1 and w of the one before times its ratio: a walk that is held
    # back at 0, which is the walk less the highest place where it was.
    walk = mx.cumsum(mx.concatenate([mx.zeros(1), ratios]))
    weights = mx.exp(walk - mx.cummax(walk))
    rests = mx.maximum(weights[:-1, None] * p[:-1] - q, 0)
    sums = row_sum(rests)
    # 1 - w first: a sum with it may round to less than the rest. Where nothing is left of a token
    # that is certain, p is q there, and whatever comes later is accepted in its place.
    whole = sums + (1 - weights[:-1])
    accepts = mx.where(whole > 0, sums / whole, 1)
    return mx.concatenate([accepts[1:], weights[-1:]]), rests


def probabilities(shaped: Float[mx.array, "N V"]) -> Float[mx.array, "N V"]:
    """Return the softmax; a power is four times as fast as MLX's exponential on a CPU."""
    weights = mx.power(math.e, shaped - shaped.max(axis=-1, keepdims=True))
    return weights / row_sum(weights)[:, None]
