"""How much a drafter learns from use; beside the drafters, as commands need it for their flags."""

from dataclasses import dataclass
from typing import Annotated

from mlx_distill.limits import Between, Count, check_fields


@dataclass(frozen=True)
class LearningConfig:
    """How much a drafter learns from use.

    Args:
        learn_mb: The folder's answers, in megabytes; the oldest make room.
        learn_seconds: The longest that is learned after an answer.
        learn_steps: The most steps that are taken after an answer.
        learn_rate: Of these steps.
        learn_least: Answers to learn from, before the first step is taken: from few of them a
            drafter learns these alone.
    """

    learn_mb: Annotated[float, Between(above=0, high=10**6)] = 256.0
    learn_seconds: Annotated[float, Between(above=0, high=10**6)] = 5.0
    learn_steps: Count = 16
    learn_rate: Annotated[float, Between(above=0, high=1)] = 5e-5
    learn_least: Count = 24

    def __post_init__(self) -> None:
        check_fields(self)
