"""How much a benchmark measures."""

from dataclasses import dataclass
from typing import Annotated

from mlx_distill.drafters.protocol import BeamWidth, DraftLength
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, Seed, check_fields
from mlx_distill.speculation.draft_verification import Verification


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Args:
        num_prompts: Prompts that are decoded by every arm.
        prompt_tokens: The longest prompt, in tokens. Documents and bare prompts are cut to it,
            longer chats are left out and counted. Without it, documents are cut to 32 and nothing
            else is.
        max_tokens: Longest answer, in tokens.
        seed: Of the draws above temperature 0; every prompt has its own.
        num_draft_tokens: Of the draft model, if one is named, in tokens.
        draft_verification: How its chains are verified above temperature 0 in this package's own
            loop; blocks unless it is said.
        warm_up_s: The arms decode for so many seconds before anything counts, and one prompt at
            least: processors start slow, and get slower when they are warm.
        timed_prompts: Prompts over which the parts of a cycle are timed.
        sweep_prompts: Prompts per cell of the sweep over beam widths and draft lengths, at most
            num_prompts; 0 leaves the sweep out.
        sweep_widths: Beam widths of the sweep.
        sweep_lengths: Draft lengths of the sweep, in tokens.
    """

    num_prompts: Count = 40
    prompt_tokens: Annotated[int | None, Between(1, 10**9)] = None
    max_tokens: Annotated[int, Between(2, 10**9)] = 128
    seed: Seed = 0
    num_draft_tokens: DraftLength = 3
    draft_verification: Verification = None
    warm_up_s: Annotated[float, Between(0, 3600)] = 0.0
    timed_prompts: Count = 20
    sweep_prompts: Annotated[int, Between(0, 10**9)] = 0
    sweep_widths: tuple[BeamWidth, ...] = (1, 2, 4, 8)
    sweep_lengths: tuple[DraftLength, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sweep_prompts > self.num_prompts:
            raise InputError(
                f"sweep_prompts must be between 0 and num_prompts {self.num_prompts}, "
                f"got {self.sweep_prompts}"
            )
