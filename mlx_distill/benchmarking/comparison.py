"""A text that was drafted beside mlx-lm's own: speed, and where the two part.

In float32 greedy texts are equal. In half precision calls with several rows round differently from
calls with one, so the best two tokens can change places where they are nearly as probable: the
margin there says whether it was that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx import nn

from mlx_distill.arrays import to_number
from mlx_distill.core.sampling import Sampling
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target


@dataclass(frozen=True)
class Difference:
    """Where a text parts from mlx-lm's.

    Args:
        place: Of the first token that differs, counted from 0.
        margin: There, by how many nats mlx-lm's best token is above the second.
    """

    place: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """The same prompt decoded plainly by mlx-lm, in the same process.

    Args:
        generation_tps: mlx-lm's tokens per second.
        speedup: How many times faster drafting was.
        first_difference: Index of the first token that differs, None if none does; above
            temperature 0 the texts are different draws and are not compared.
        margin: There, by how much mlx-lm's best log-probability is above the second.
    """

    generation_tps: float
    speedup: float
    first_difference: int | None = None
    margin: float | None = None


def compare(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    tokens: list[int],
    generation_tps: float,
    sampling: Sampling,
    cache: CacheConfig,
    max_tokens: int,
) -> Comparison:
    """Decode a prompt with mlx-lm alone and compare speed and, when greedy, tokens.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        prompt: Token ids.
        tokens: What was written with drafts.
        generation_tps: How fast.
        sampling: How tokens are drawn.
        cache: How keys and values are kept.
        max_tokens: The longest answer, in tokens.
    """
    found, last = None, None
    for place, last in enumerate(plain(model, tokenizer, prompt, sampling, cache, max_tokens)):
        if place < len(tokens):  # a stop text ends what was drafted, and not what mlx-lm writes
            found = found or _difference(place, last, tokens)
    assert last is not None
    speed = (last.generation_tps, generation_tps / last.generation_tps)
    if sampling.temperature or found is None:
        return Comparison(*speed)
    return Comparison(*speed, found.place, found.margin)


def first_difference(responses: Iterable[Any], tokens: list[int]) -> Difference | None:
    """Return where some tokens part from mlx-lm's responses, None if they are the same."""
    found = (_difference(place, response, tokens) for place, response in enumerate(responses))
    return next((one for one in found if one), None)


def _difference(place: int, response: Any, tokens: list[int]) -> Difference | None:
    if tokens[place : place + 1] == [response.token]:
        return None
    best = mx.sort(response.logprobs.astype(mx.float32))[-2:]
    return Difference(place, float(to_number(best[1] - best[0])))


def plain(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    sampling: Sampling,
    cache: CacheConfig,
    max_tokens: int,
) -> Iterator[Any]:
    """Return mlx-lm's responses, by its own loop and over caches that are bounded as ours are."""
    options = asdict(cache)
    options["prompt_cache"] = prompt_caches(model, options.pop("max_kv_size"))
    sampler = sampling.mlx_lm_sampler(Target.of(model).vocab_size)
    return mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens, sampler=sampler, **options)
