"""The random numbers behind a text that was drawn already.

A token is the best of the target's log-probabilities and Gumbel noise. Of a text that somebody else
has drawn, the noise is not known; but given the tokens it has a law of its own, and can be drawn
from it. Text and noise are then distributed as if they had come out of decoding, so whatever is
made in sight of the noise can be judged by the text.

    greatest value      B ~ Gumbel(0), for the log-probabilities are normalised
    of the token y      g_y = B - log p_y
    of any other x      g_x = -log(exp(log p_x - B) + exp(-g)),  g ~ Gumbel(0): cut off below B

Source:
    Maddison, Tarlow and Minka 2014, arXiv:1411.0030, section 3 (truncated Gumbels).
"""

import mlx.core as mx
from jaxtyping import Float, Integer


def noise_behind(
    log_probs: Float[mx.array, "N V"], tokens: Integer[mx.array, " N"], key: mx.array
) -> Float[mx.array, "N V"]:
    """Return noise with which each row's best token is the one that was drawn.

    Args:
        log_probs: Of the law that the tokens were drawn from, normalised, in float32.
        tokens: What was drawn, one per row; each had a chance.
        key: Of the random numbers.
    """
    first, second = mx.random.split(key)
    greatest = mx.random.gumbel((tokens.size, 1), key=first)
    free = mx.random.gumbel(log_probs.shape, key=second)
    others = -mx.logaddexp(log_probs - greatest, -free)
    drawn = greatest - mx.take_along_axis(log_probs, tokens[:, None], axis=1)
    return mx.put_along_axis(others, tokens[:, None], drawn, axis=1)
