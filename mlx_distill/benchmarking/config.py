"""How much a benchmark measures."""

from dataclasses import dataclass

from mlx_distill.config import check_seed
from mlx_distill.drafters.protocol import LARGEST
from mlx_distill.errors import InputError


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Args:
        num_prompts: Prompts that are decoded by every arm; at least 1.
        prompt_tokens: The longest prompt, in tokens; at least 1. Documents and bare prompts are cut
            to it, longer chats are left out and counted. Without it, documents are cut to 32 and
            nothing else is.
        max_tokens: Longest answer, in tokens; at least 2.
        seed: Of the draws above temperature 0, between 0 and 2**32 - 1; every prompt has its own.
        num_draft_tokens: Of the draft model, if one is named, in tokens; 1 to 64.
        timed_prompts: Prompts over which the parts of a cycle are timed; at least 1.
        sweep_prompts: Prompts per cell of the sweep over beam widths and draft lengths, at most
            num_prompts; 0 leaves the sweep out.
        sweep_widths: Beam widths of the sweep, 1 to 256.
        sweep_lengths: Draft lengths of the sweep, in tokens, 1 to 64.
    """

    num_prompts: int = 40
    prompt_tokens: int | None = None
    max_tokens: int = 128
    seed: int = 0
    num_draft_tokens: int = 3
    timed_prompts: int = 20
    sweep_prompts: int = 0
    sweep_widths: tuple[int, ...] = (1, 2, 4, 8)
    sweep_lengths: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "num_draft_tokens", "timed_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.sweep_prompts <= self.num_prompts:
            raise InputError(
                f"sweep_prompts must be between 0 and num_prompts {self.num_prompts}, "
                f"got {self.sweep_prompts}"
            )
        check_seed("seed", self.seed)
        if self.num_draft_tokens > LARGEST["draft_length"]:
            raise InputError(
                f"num_draft_tokens must be at most {LARGEST['draft_length']}, "
                f"got {self.num_draft_tokens}"
            )
        for name, kind in (("sweep_widths", "beam_width"), ("sweep_lengths", "draft_length")):
            for value in getattr(self, name):
                if not 1 <= value <= LARGEST[kind]:
                    raise InputError(
                        f"{name} must be at least 1 and at most {LARGEST[kind]}, got {value}"
                    )
        if self.max_tokens < 2:
            raise InputError(f"max_tokens must be at least 2, to time, got {self.max_tokens}")
