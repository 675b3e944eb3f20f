"""How something is trained: the settings, and the learning rate that follows from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import mlx.core as mx

from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, check_fields

NEW, LAYERS = "new weights", "chosen layers"
PRETRAINED, ADAPTERS = "pretrained weights", "adapters"
# What is trained decides how far a step may go: where weights know something already, the rate of
# new ones would wash much of it out at first. Measured in docs/distillation.md.
RATES = {NEW: 1e-3, LAYERS: 2.5e-4, PRETRAINED: 3e-5, ADAPTERS: 1e-4}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: Number of updates.
        learning_rate: At its peak; it rises linearly over warmup and falls along a cosine. Without
            it, by what is trained: 1e-3 for new weights and drafters, 2.5e-4 for chosen layers of a
            teacher, 3e-5 for pretrained weights, 1e-4 for adapters.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        max_grad_norm: Longer gradients are scaled down to this norm.
        accumulate: Batches per update; their gradients are added and divided once.
        evaluate_every: Steps between evaluations on held-out data.
        checkpoint_every: Steps between checkpoints.
        patience: Evaluations without a better one after which the training ends; 0 for never.
        keep_best: End with the weights of the best evaluation instead of the last step's.
        max_minutes: End after so long, counted from the first step's end, if the steps are not done
            by then; the learning rate has come down at the end of whichever is first. Such a run
            does not repeat bit by bit. Without it, only the steps count.
    """

    steps: Count = 1000
    learning_rate: Annotated[float | None, Between(above=0, high=1000)] = None
    warmup: Annotated[float, Between(0, 1)] = 0.1
    weight_decay: Annotated[float, Between(0, 1000)] = 0.01
    max_grad_norm: Annotated[float, Between(above=0, high=1e9)] = 1.0
    accumulate: Count = 1
    evaluate_every: Count = 100
    checkpoint_every: Count = 100
    patience: Annotated[int, Between(0, 10**9)] = 0
    keep_best: bool = False
    max_minutes: Annotated[float | None, Between(above=0, high=10**6)] = None

    def __post_init__(self) -> None:
        check_fields(self)

    def resolved(self, trained: str) -> "TrainingConfig":
        """Return the same with a learning rate: its own, or that of what is trained.

        Args:
            trained: A key of ``RATES``.

        Raises:
            InputError: If it is none.
        """
        if trained not in RATES:
            raise InputError(f"trained must be one of {', '.join(RATES)}, got {trained}")
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=RATES[trained])


def schedule(config: TrainingConfig) -> Callable[[mx.array], mx.array]:
    """Return the learning rate as a function of the step: linear warm-up, then a cosine to 0."""
    peak = config.resolved(NEW).learning_rate
    assert peak is not None
    rise = max(1, round(config.warmup * config.steps))
    fall = max(1, config.steps - rise)

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / rise
        down = 0.5 * (1 + mx.cos(mx.minimum(1.0, (step - rise) / fall) * math.pi))
        return peak * mx.where(step < rise, up, down)

    return rate
