"""A model and its drafter: what is measured, and what a calibration holds for."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlx import nn

from mlx_distill.data.tokens import usable_tokenizer
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.target.exact import ExactTarget
from mlx_distill.target.target import Target

TEXT = "Once upon a time there was a small house by the sea, and in it lived an old baker. "


@dataclass(frozen=True)
class Pair:
    """What is measured.

    Args:
        model: The target's model.
        tokenizer: Its tokenizer.
        drafter: Drafts for it.
        cache: How keys and values are kept.
        exact_rows: Whether drafted texts are the plainly decoded ones to the last bit.
    """

    model: nn.Module
    tokenizer: Any
    drafter: Drafter
    cache: CacheConfig = field(default_factory=CacheConfig)
    exact_rows: bool = False

    @property
    def target(self) -> Target:
        """The target."""
        return self._exact if self.exact_rows else Target.of(self.model)

    @cached_property
    def _exact(self) -> Target:
        return ExactTarget(self.model)

    def tokens(self, count: int) -> list[int]:
        """Return a text of so many tokens."""
        some = list(usable_tokenizer(self.tokenizer).encode(TEXT))
        return (some * (count // len(some) + 1))[:count]
