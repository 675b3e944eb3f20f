"""Reading whole texts: with fresh caches, always.

Some models share keys and values between layers through their cache and compute something else
without one (gemma3n is two standard deviations off). So a model is never called without, in
training neither. A fresh cache of ``fresh_caches`` costs nothing: it hands out the arrays that it
is given, gradients flow through it, and nothing is allocated for tokens to come.
"""

import inspect
from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from mlx_distill.errors import InputError
from mlx_distill.target.layer_cache import LayerCache


class WholeTextCache(KVCache):
    """A KV cache that is given all of a text at once, and keeps no room for more."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the text's keys and values; those that are given later are put behind them."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


def fresh_caches(model: nn.Module) -> list[LayerCache]:
    """Return empty caches for one call on whole texts, right-padded, any number of them."""
    return [_light(cache) for cache in make_prompt_cache(model)]


def read_whole(
    network: nn.Module, texts: Int[mx.array, "B T"], **inputs: object
) -> Float[mx.array, "B T V"]:
    """Return a network's logits for whole texts.

    Args:
        network: A language model of mlx-lm, or any network that is called with token ids alone.
        texts: Token ids, right-padded.
        inputs: What else the network is called with.
    """
    return network(texts, **{**fresh_inputs(network), **inputs})


def fresh_inputs(network: nn.Module) -> dict[str, list[LayerCache]]:
    """Return what a network is called with beside whole texts: a cache, if it takes one."""
    takes = "cache" in inspect.signature(type(network).__call__).parameters
    can_make = hasattr(network, "make_cache") or hasattr(network, "layers")
    return {"cache": fresh_caches(network)} if takes and can_make else {}


def vocab_width(network: nn.Module) -> int:
    """Return how many logits a network has; nothing is computed."""
    return read_whole(network, mx.array([[0, 0]])).shape[-1]


def check_tokens(network: nn.Module, texts: Sequence[Sequence[int]], noun: str = "texts") -> None:
    """Raise InputError if a network has no embedding for a token: it would read beyond the table.

    Args:
        network: Is to read the texts.
        texts: Token ids; none is empty.
        noun: What the texts are.
    """
    lowest, highest = min(map(min, texts)), max(map(max, texts))
    width = vocab_width(network)
    if lowest < 0 or highest >= width:
        raise InputError(
            f"the {noun} hold token {lowest if lowest < 0 else highest}, but a "
            f"{type(network).__name__} of {width} tokens is to read them; its vocab_size does not "
            "fit the tokenizer"
        )


def _light(cache: LayerCache) -> LayerCache:
    if isinstance(cache, CacheList):
        cache.caches = tuple(_light(part) for part in cache.caches)
    return WholeTextCache() if type(cache) is KVCache else cache
