"""How keys and values are kept while a text is written."""

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from mlx_lm.generate import maybe_quantize_kv_cache

from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, OneOf, check_fields
from mlx_distill.target.layer_cache import LayerCache

# One entry per layer.
PromptCache: TypeAlias = list[LayerCache]


@dataclass(frozen=True)
class CacheConfig:
    """The cache of keys and values.

    Args:
        max_kv_size: Longest context that is kept, in tokens; older ones are dropped. Without it,
            all are kept.
        kv_bits: Quantise the cache to so many bits. Without it, it is not. Exact rows keep a
            drafted text the plainly decoded one; else rounding may become another code.
        kv_group_size: Group size of that quantisation.
        quantized_kv_start: Quantise from so many tokens on.
        prefill_step_size: Tokens of the prompt that are read at once.
    """

    max_kv_size: Annotated[int | None, Between(8, 10**9)] = None
    kv_bits: Annotated[int | None, OneOf(2, 3, 4, 5, 6, 8)] = None
    kv_group_size: Annotated[int, OneOf(32, 64, 128)] = 64
    quantized_kv_start: Annotated[int, Between(0, 10**9)] = 5000
    prefill_step_size: Count = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise InputError(
                "kv_bits and max_kv_size exclude each other: mlx-lm's rotating cache "
                "cannot be quantised"
            )

    def quantize(self, caches: PromptCache) -> None:
        """Quantise the caches that have grown long enough, in place."""
        try:
            maybe_quantize_kv_cache(
                caches, self.quantized_kv_start, self.kv_group_size, self.kv_bits
            )
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"the cache cannot be quantised: {error}") from None

    def quantizes_within(self, start: int, num_tokens: int) -> bool:
        """Return whether a cache of ``start`` tokens is quantised within the next ones.

        Plain decoding switches between two tokens; a tree must not reach over that border.
        """
        border = self.quantized_kv_start
        return self.kv_bits is not None and start < border <= start + num_tokens
