"""How something is trained: the settings, and the learning rate that follows from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_distill.errors import InputError

NEW, LAYERS = "new weights", "chosen layers"
PRETRAINED, ADAPTERS = "pretrained weights", "adapters"
# What is trained decides how far a step may go: where weights know something already, the rate of
# new ones would wash much of it out at first. Measured in docs/distillation.md.
RATES = {NEW: 1e-3, LAYERS: 2.5e-4, PRETRAINED: 3e-5, ADAPTERS: 1e-4}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: Number of updates; at least 1.
        learning_rate: At its peak, above 0; it rises linearly over warmup and falls along a
            cosine. Without it, by what is trained: 1e-3 for new weights and drafters, 2.5e-4 for
            chosen layers of a teacher, 3e-5 for pretrained weights, 1e-4 for adapters.
        warmup: Share of the steps, between 0 and 1.
        weight_decay: Of AdamW; at least 0.
        max_grad_norm: Longer gradients are scaled down to this norm; above 0.
        accumulate: Batches per update, at least 1; their gradients are added and divided once.
        evaluate_every: Steps between evaluations on held-out data; at least 1.
        checkpoint_every: Steps between checkpoints; at least 1.
        patience: Evaluations without a better one after which the training ends, at least 1; 0 for
            never.
        keep_best: End with the weights of the best evaluation instead of the last step's.
    """

    steps: int = 1000
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    accumulate: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    patience: int = 0
    keep_best: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {value}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup must be between 0 and 1, got {self.warmup}")
        if self.patience < 0:
            raise InputError(f"patience must be at least 0, got {self.patience}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")

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
