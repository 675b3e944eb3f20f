"""The training loop: one for everything that is trained here.

The loop is a generator. It yields after every step; drawing bars and writing logs is the caller's
business. Nothing in it is random: the batch is a function of the step's number, so a run that was
killed and one that was not end with the same bits.
"""

import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_distill.arrays import to_number
from mlx_distill.errors import InputError
from mlx_distill.files import check_safetensors

NETWORK, OPTIMIZER = "network.safetensors", "optimizer.safetensors"

# (sum, count), and perhaps the terms that the sum is made of, by name, for the log.
Loss = Callable[[Any], tuple[Any, ...]]


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: Number of updates.
        learning_rate: At its peak; it rises linearly over ``warmup`` and falls along a cosine.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        max_grad_norm: Longer gradients are scaled down to this norm.
        accumulate: Batches per update; their gradients are added and divided once.
        evaluate_every: Steps between evaluations on held-out data.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    accumulate: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "evaluate_every", "checkpoint_every"):
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
        loss: Of this step's batches, before the update.
        rows: Of the data, that the batches were made of, if they know.
        count: What the loss was divided by: positions, or examples.
        learning_rate: Of this step.
        parts: The terms that the loss is made of, if it names them.
        evaluation: What ``evaluate`` said, on the steps where it was asked.
        saves: Whether a checkpoint is written after this step.
        stopped: Whether the training ends here because it was asked to.
    """

    step: int
    loss: float
    rows: list[int] = field(default_factory=list)
    count: float = 0.0
    learning_rate: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    saves: bool = False
    stopped: bool = False


def train(
    network: nn.Module,
    loss: Loss,
    batch_at: Callable[[int], Any],
    evaluate: Callable[[], dict[str, Any]],
    config: TrainingConfig,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train a network, from its last checkpoint if there is one; yield after every step.

    A step is yielded before its checkpoint is written.

    Args:
        network: Its trainable parameters are updated in place.
        loss: Returns ``(sum, count)`` of the network's loss on a batch, and perhaps its parts.
        batch_at: Returns a batch by its number, from 0; a step takes ``accumulate`` of them.
        evaluate: Judges the network on held-out data.
        config: How.
        folder: Where the checkpoints lie.
        stop: Asked after every step; True ends the training there, with a checkpoint.

    Raises:
        InputError: If the loss is not a number; the last checkpoint is from before.
    """
    optimizer = optim.AdamW(learning_rate=schedule(config), weight_decay=config.weight_decay)
    optimizer.init(network.trainable_parameters())
    done = restore(folder, network, optimizer)
    loss_and_grad = value_and_grad(network, loss)
    for step in range(done, config.steps):
        progress, grads = _gradients(loss_and_grad, batch_at, step, config.accumulate)
        grads, norm = optim.clip_grad_norm(grads, config.max_grad_norm)
        for name, number in (("loss", progress.loss), ("gradient", to_number(norm))):
            if not math.isfinite(number):
                raise _no_number(name, number, progress, folder)
        optimizer.update(network, grads)
        mx.eval(network.parameters(), optimizer.state)
        progress.learning_rate = float(to_number(optimizer.learning_rate))
        progress.stopped = stop()
        last = step + 1 == config.steps
        due = (step + 1) % config.checkpoint_every == 0
        progress.saves = last or due or progress.stopped
        if last or (step + 1) % config.evaluate_every == 0:
            progress.evaluation = evaluate()
            for name, number in progress.evaluation.items():
                if isinstance(number, float) and math.isnan(number):
                    raise _no_number(f"held-out {name}", number, progress, folder)
        yield progress  # what the caller keeps of a step is there before its checkpoint is
        if progress.saves:
            save(folder, step + 1, network, optimizer)
        if progress.stopped:
            return


def _no_number(name: str, number: float, progress: Progress, folder: Path) -> InputError:
    rows = f", on rows {progress.rows} of the data" if progress.rows else ""
    return InputError(
        f"the {name} of step {progress.step} is {number}{rows}; {_last_good(folder)}; "
        "a smaller learning rate may help"
    )


def _gradients(
    loss_and_grad: Callable[[Any], Any],
    batch_at: Callable[[int], Any],
    step: int,
    accumulate: int,
) -> tuple[Progress, Any]:
    """Return a step's loss and gradients: sums over its batches, divided once."""
    total, count, grads = mx.array(0.0), mx.array(0.0), None
    parts, rows = {}, []
    for number in range(step * accumulate, (step + 1) * accumulate):
        batch = batch_at(number)
        rows += getattr(batch, "rows", ())
        (value, here, *more), new = loss_and_grad(batch)
        total, count = total + value, count + here
        grads = new if grads is None else tree_map(mx.add, grads, new)
        for name, part in (more[0] if more else {}).items():
            parts[name] = parts.get(name, 0.0) + part * here
        mx.eval(total, count, grads, parts)
    divisor = mx.maximum(count, 1)
    grads = tree_map(lambda gradient: gradient / divisor.astype(gradient.dtype), grads)
    means = {name: float(to_number(part / divisor)) for name, part in parts.items()}
    loss = float(to_number(total / divisor))
    return Progress(step + 1, loss, rows, float(to_number(count)), parts=means), grads


@contextmanager
def stopping(message: str) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the training after the step that runs, with a checkpoint.

    The second one ends it at once.

    Args:
        message: Printed on stderr at the first one.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print(f"\n{message}", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread can hear of Ctrl-C
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


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
        _save_arrays(writing / NETWORK, kept(network))
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
    """Load the last checkpoint into a network and its optimizer; return its step, 0 if none.

    That newer ones are damaged is said on stderr.
    """
    found = checkpoints(folder)
    last = found[-1].name if found else ""
    for name in sorted(path.name for path in folder.glob("step-*") if path.name > last):
        print(f"{name} is damaged; going on from {last or 'the beginning'}", file=sys.stderr)
    if not found:
        return 0
    network.load_weights(str(found[-1] / NETWORK), strict=False)
    state = mx.load(str(found[-1] / OPTIMIZER))
    optimizer.state = tree_unflatten(list(state.items()))  # pyright: ignore
    mx.eval(network.parameters(), optimizer.state)
    return step_of(found[-1])


def kept(network: nn.Module) -> dict[str, mx.array]:
    """Return what training changes: trainable parameters, and running means of normalisations.

    A frozen base under adapters may be a hundred times as large, and is as it was.
    """
    trained: dict[str, Any] = dict(tree_flatten(network.trainable_parameters()))
    every: dict[str, Any] = dict(tree_flatten(network.parameters()))
    running = ("running_mean", "running_var")
    return trained | {name: x for name, x in every.items() if name.endswith(running)}


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
    arrays: dict[str, Any] = dict(tree_flatten(tree))  # of a flat one, itself
    mx.save_safetensors(str(path), arrays)
    check_safetensors(path)
