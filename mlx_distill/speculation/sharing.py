"""Which texts share calls of the target: those whose caches are rows of one kind."""

from collections.abc import Hashable
from dataclasses import dataclass

from mlx_lm.models.cache import QuantizedKVCache

from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.requests import Request
from mlx_distill.target.batch.rows import kind_of, packed_kind
from mlx_distill.target.layer_cache import cached_tokens, leaves
from mlx_distill.target.target import Target


@dataclass(frozen=True)
class Alone:
    """A text that shares no calls.

    Args:
        why: The reason, for whoever asked for a batch.
    """

    why: str


def sharing(target: Target, request: Request, caches: PromptCache, most: int) -> Hashable | Alone:
    """Return the kind of a text's rows, or why it is written alone.

    Args:
        target: Writes it.
        request: The text.
        caches: Its caches.
        most: The longest answer, in tokens.
    """
    kind = kind_of(caches)
    if kind is None:
        kinds = sorted({type(cache).__name__ for cache in caches if kind_of([cache]) is None})
        return Alone(f"its cache ({', '.join(kinds)}) holds no rows of a batch")
    if not target.takes_batches:
        return Alone("the model takes no texts of different lengths in one call")
    config = request.cache
    if config.kv_bits is None or any(isinstance(c, QuantizedKVCache) for c in leaves(caches)):
        return kind
    read, start = cached_tokens(caches) + request.prompt.size, config.quantized_kv_start
    if read >= start:
        return packed_kind(kind, config.kv_group_size, config.kv_bits)
    if read + most < start:
        return kind
    return Alone("its keys and values are quantised while it is written")
