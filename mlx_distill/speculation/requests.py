"""What can be asked of the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import mlx.core as mx
from jaxtyping import Int

from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner, Planner
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, check_fields
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.drafted_text import LogitsProcessor

# Texts that share a call.
BatchSize = Annotated[int, Between(1, 1024)]


@dataclass(frozen=True)
class Request:
    """A text to write.

    Args:
        prompt: Token ids.
        max_tokens: The longest answer, in tokens.
        sampling: How tokens are drawn.
        seed: Repeats the random numbers.
        stop: Texts that end the answer; they are not part of it.
        logits_processors: As mlx-lm's; they see the prompt and the answer so far.
        prompt_cache: Holds the text before the prompt, and afterwards the prompt and the answer
            too; None for a new one.
        planner: Says how much to draft; or a function that returns who says it, and is asked for it
            when nothing can be refused any more.
        cache: How keys and values are kept.
        batch_planner: Says it instead while texts share their calls; None asks ``planner``.

    Raises:
        InputError: If a value is out of its range.
    """

    prompt: Int[mx.array, " T"]
    max_tokens: Count = 256
    sampling: Sampling = GREEDY
    seed: Annotated[int | None, Between(0, 2**63 - 1)] = None
    stop: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    prompt_cache: PromptCache | None = None
    planner: Planner | Callable[[], Planner] = field(
        default_factory=lambda: FixedPlanner(DraftPlan())
    )
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch_planner: Planner | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if any(not text for text in self.stop):
            raise InputError("a stop text must not be empty")
