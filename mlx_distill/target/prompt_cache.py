"""Prompt caches of a bounded length, for every model and not only those mlx-lm makes them for.

``mlx_lm.models.cache.make_prompt_cache`` takes a ``max_kv_size`` and leaves it out of account where
a model makes its own caches, as 52 of its files do, Llama's among them. There, every layer that
keeps all of the text gets the rotating cache that mlx-lm gives to the other models.
"""

from pathlib import Path

from mlx import nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
)

from mlx_distill.errors import InputError, one_line
from mlx_distill.safetensors import check_safetensors
from mlx_distill.target.layer_cache import LayerCache, leaves
from mlx_distill.target.opening import COUNTS_SLOTS, PLACED_BY_SLOT

# Windows, chunks and states do not grow with the text.
BOUNDED = (RotatingKVCache, ChunkedKVCache, ArraysCache)
# Their attention picks keys or places queries by slot, and a ring's are not in the text's order.
PICKED_BY_SLOT = {"deepseek_v32", "glm_moe_dsa"} | PLACED_BY_SLOT | COUNTS_SLOTS
KEEP = 4  # as mlx-lm: the first tokens stay, which attention leans on


def prompt_caches(model: nn.Module, max_kv_size: int | None = None) -> list[LayerCache]:
    """Return empty caches for a text.

    Args:
        model: Any model of mlx-lm.
        max_kv_size: Tokens that a layer remembers at the most: the first four and the latest; None
            for all. Layers with windows, chunks or states of their own keep those.

    Raises:
        InputError: If the model has a cache that cannot be bounded so.
    """
    caches = make_prompt_cache(model)
    if max_kv_size is None:
        return caches
    if max_kv_size <= KEEP:
        raise InputError(f"max_kv_size must be above {KEEP}, got {max_kv_size}")
    if getattr(model, "model_type", None) not in PICKED_BY_SLOT:
        caches = [_bounded(cache, max_kv_size) for cache in caches]
    unbounded = sorted({type(c).__name__ for c in leaves(caches) if not isinstance(c, BOUNDED)})
    if unbounded:
        raise InputError(
            f"max_kv_size cannot bound this model's cache ({', '.join(unbounded)}); leave it out"
        )
    return caches


def _bounded(cache: LayerCache, max_kv_size: int) -> LayerCache:
    if isinstance(cache, CacheList):
        return CacheList(*(_bounded(part, max_kv_size) for part in cache.caches))
    if type(cache) is KVCache:
        return RotatingKVCache(max_size=max_kv_size, keep=KEEP)
    return cache


def read_prompt_cache(path: Path) -> tuple[list[LayerCache], dict[str, str]]:
    """Return the caches that ``mlx_lm.cache_prompt`` wrote to a file, and what it says of them.

    Raises:
        InputError: If the file is not there, is damaged, or holds something else.
    """
    check_safetensors(path)
    try:
        caches, said = load_prompt_cache(str(path), return_metadata=True)
    except Exception as error:  # whatever reading another file's arrays as caches raises
        raise InputError(f"{path} is no prompt cache of mlx-lm: {one_line(error)}") from None
    return caches, said if isinstance(said, dict) else {}
