"""Plain decoding with filters that do not sort the vocabulary."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from mlx_distill.core.sampling import Sampling
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.plain import PlainDecoding, decode_plainly
from mlx_distill.speculation.statistics import DraftCounters

PROMPT = mx.array([3, 1, 4, 1, 5])


def model_of(vocab_size: int, spread: float) -> Model:
    """Return a model with random weights; the spread is that of its logits."""
    mx.random.seed(0)
    sizes = ("llama", 32, 2, 64, 2, 1e-5, vocab_size)
    args = ModelArgs(*sizes, tie_word_embeddings=False)
    model = Model(args)
    model.lm_head.weight = spread * mx.random.normal((vocab_size, 32)) / 32**0.5
    return model


def text(model: Model, sampling: Sampling, count: int, exact: bool) -> tuple[list[int], int]:
    """Return the tokens of a text, and how many its caches hold.

    Where a logits processor looks on, every filter looks at all tokens.
    """
    caches = make_prompt_cache(model)
    processors = (lambda tokens, logits: logits,) if exact else ()
    counters = DraftCounters()
    decoding = PlainDecoding(
        model, sampling, CacheConfig(), caches, processors, count, False, counters
    )
    tokens = [one.token for one in decode_plainly(decoding, PROMPT, mx.random.key(7))]
    return tokens, caches[0].offset


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, top_p=0.5),
        Sampling(1.0, top_p=0.95),
        Sampling(1.0, top_k=20),
        Sampling(1.0, top_p=0.9, top_k=900),
    ],
)
def test_draws_are_those_of_filters_that_sort(spread: float, sampling: Sampling):
    model = model_of(5000, spread)
    for count in (1, 40):
        tokens, cached = text(model, sampling, count, exact=False)
        assert (tokens, cached) == text(model, sampling, count, exact=True)
        assert len(tokens) == count
