"""The training loop: one for everything that is trained here.

The loop is a generator. It yields after every step; drawing bars and writing logs is the caller's
business. Nothing in it is random: the batch is a function of the step's number, so a run that was
killed and one that was not end with the same bits.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.arrays import to_number
from mlx_distill.checkpoint import check_safetensors
from mlx_distill.errors import InputError

NETWORK, OPTIMIZER = "network.safetensors", "optimizer.safetensors"

Loss = Callable[[Any], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: Number of updates.
        learning_rate: At its peak; it rises linearly over ``warmup`` and falls along a cosine.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        max_grad_norm: Longer gradients are scaled down to this norm.
        evaluate_every: Steps between evaluations on held-out data.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    evaluate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup must be between 0 and 1, got {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass
class Progress:
    """Where a training stands after a step.

    Args:
        step: Number of updates so far.
        loss: Of this step's batch, before the update.
        evaluation: What ``evaluate`` said, on the steps where it was asked.
    """

    step: int
    loss: float
    evaluation: dict[str, Any] = field(default_factory=dict)


def train(
    network: nn.Module,
    loss: Loss,
    batch_at: Callable[[int], Any],
    evaluate: Callable[[], dict[str, Any]],
    config: TrainingConfig,
    folder: Path,
) -> Iterator[Progress]:
    """Train a network, from its last checkpoint if there is one; yield after every step.

    A step is yielded before its checkpoint is written.

    Args:
        network: Its trainable parameters are updated in place.
        loss: Returns ``(sum, count)`` of the network's loss on a batch.
        batch_at: Returns the batch of a step, counted from 0.
        evaluate: Judges the network on held-out data.
        config: How.
        folder: Where the checkpoints lie.

    Raises:
        InputError: If the loss is not a number; the last checkpoint is from before.
    """
    optimizer = optim.AdamW(learning_rate=schedule(config), weight_decay=config.weight_decay)
    optimizer.init(network.trainable_parameters())
    done = restore(folder, network, optimizer)

    def mean(batch: Any) -> mx.array:
        total, count = loss(batch)
        return total / mx.maximum(count, 1)

    loss_and_grad = value_and_grad(network, mean)
    for step in range(done, config.steps):
        value, grads = loss_and_grad(batch_at(step))
        grads, norm = optim.clip_grad_norm(grads, config.max_grad_norm)
        progress = Progress(step + 1, to_number(value))
        for name, number in (("loss", progress.loss), ("gradient", to_number(norm))):
            if not math.isfinite(number):
                raise InputError(
                    f"the {name} of step {step + 1} is {number}; {_last_good(folder)}; "
                    "a smaller learning rate may help"
                )
        optimizer.update(network, grads)
        mx.eval(network.parameters(), optimizer.state)
        last = step + 1 == config.steps
        if last or (step + 1) % config.evaluate_every == 0:
            progress.evaluation = evaluate()
        yield progress  # what the caller keeps of a step is there before its checkpoint is
        if last or (step + 1) % config.checkpoint_every == 0:
            save(folder, step + 1, network, optimizer)


def schedule(config: TrainingConfig) -> Callable[[mx.array], mx.array]:
    """Return the learning rate as a function of the step: linear warm-up, then a cosine to 0."""
    rise = max(1, round(config.warmup * config.steps))
    fall = max(1, config.steps - rise)

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / rise
        down = 0.5 * (1 + mx.cos(mx.minimum(1.0, (step - rise) / fall) * math.pi))
        return config.learning_rate * mx.where(step < rise, up, down)

    return rate


def save(folder: Path, step: int, network: nn.Module, optimizer: optim.Optimizer) -> None:
    """Write a checkpoint: complete under its name or not there at all; keep the one before too.

    Raises:
        InputError: If it cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:07d}"
    writing = folder / "writing"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        _save_arrays(writing / NETWORK, network.parameters())
        _save_arrays(writing / OPTIMIZER, optimizer.state)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(writing, final)
    except (OSError, RuntimeError, InputError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise InputError(
            f"the checkpoint of step {step} could not be written ({error}); {_last_good(folder)}"
        ) from None
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def restore(folder: Path, network: nn.Module, optimizer: optim.Optimizer) -> int:
    """Load the last checkpoint into a network and its optimizer; return its step, 0 if none."""
    found = checkpoints(folder)
    if not found:
        return 0
    network.load_weights(str(found[-1] / NETWORK))
    state = mx.load(str(found[-1] / OPTIMIZER))
    optimizer.state = tree_unflatten(list(state.items()))  # pyright: ignore
    mx.eval(network.parameters(), optimizer.state)
    return step_of(found[-1])


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first.

    What a power cut damaged is passed over: the one before it serves.
    """
    return sorted(path for path in folder.glob("step-*") if _is_whole(path))


def step_of(checkpoint: Path) -> int:
    """Return the number of updates that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def _is_whole(checkpoint: Path) -> bool:
    try:
        for name in (NETWORK, OPTIMIZER):
            check_safetensors(checkpoint / name)
    except InputError:
        return False
    return True


def _last_good(folder: Path) -> str:
    kept = checkpoints(folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint before it"


def _save_arrays(path: Path, tree: Any) -> None:
    """Write the arrays of a tree and check that all of them arrived.

    A full disk can cut files short without a word from the writer.
    """
    arrays: dict[str, Any] = dict(tree_flatten(tree))
    mx.save_safetensors(str(path), arrays)
    check_safetensors(path)
