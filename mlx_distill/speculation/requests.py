"""What can be asked of the engine."""

from dataclasses import dataclass, field

import mlx.core as mx
from jaxtyping import Int

from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner, Planner
from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.cycle import LogitsProcessor


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
        planner: Says how much to draft.
        cache: How keys and values are kept.

    Raises:
        InputError: If a value is out of its range.
    """

    prompt: Int[mx.array, " T"]
    max_tokens: int = 256
    sampling: Sampling = GREEDY
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    prompt_cache: PromptCache | None = None
    planner: Planner = field(default_factory=lambda: FixedPlanner(DraftPlan()))
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if any(not text for text in self.stop):
            raise InputError("a stop text must not be empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
