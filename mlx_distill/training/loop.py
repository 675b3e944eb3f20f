"""The training loop: one for everything that is trained here.

The loop is a generator. It yields after every step; drawing bars and writing logs is the caller's
business. Nothing in it is random: the batch is a function of the step's number, so a run that was
killed and one that was not end with the same bits.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn

from mlx_distill.arrays import to_number
from mlx_distill.errors import InputError
from mlx_distill.training.best import Best, Score, held_out_score
from mlx_distill.training.checkpoints import (
    NETWORK,
    OPTIMIZER,
    check_arrays,
    checkpoint_of,
    last_good,
    restore,
    save,
)
from mlx_distill.training.config import TrainingConfig, schedule
from mlx_distill.training.gradients import Gradients, clipped
from mlx_distill.training.masters import Masters
from mlx_distill.training.quick_steps import QuickSteps
from mlx_distill.training.updates import updated

# (sum, count), and perhaps the terms that the sum is made of, by name, for the log.
Loss = Callable[[Any], tuple[Any, ...]]


# How often a quick step's numbers are read.
READ_EVERY = 20


@dataclass
class Progress:
    """Where a training stands after a step.

    Args:
        step: Number of updates so far.
        loss: Of this step's batches, before the update; of quick steps, of the last that was read.
        rows: Of the data, that the batches were made of, if they know.
        count: What the loss was divided by: positions, or examples.
        learning_rate: Of this step.
        parts: The terms that the loss is made of, if it names them.
        evaluation: What ``evaluate`` said, on the steps where it was asked.
        saves: Whether a checkpoint is written after this step.
        ended: Whether this is the last step: all are done, or the patience is over.
        stopped: Whether the training was asked to stop here.
        share: How much of the training is over, by steps or by time.
        seconds: What the step took, from its batches to its update; judging and saving do not
            count. Of quick steps, for which nobody waits, it says nothing.
    """

    step: int
    loss: float
    rows: list[int] = field(default_factory=list)
    count: float = 0.0
    learning_rate: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    saves: bool = False
    ended: bool = False
    stopped: bool = False
    share: float = 0.0
    seconds: float = 0.0


def train(
    network: nn.Module,
    loss: Loss,
    batch_at: Callable[[int], Any],
    evaluate: Callable[[], dict[str, Any]],
    config: TrainingConfig,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
    score: Score = held_out_score,
    quick: bool = False,
) -> Iterator[Progress]:
    """Train a network, from its last checkpoint if there is one; yield after every step.

    A step is yielded before its checkpoint is written. The network computes in its own types; what
    is updated, clipped, divided and written to checkpoints is float32.

    Args:
        network: Its trainable parameters are updated in place.
        loss: Returns ``(sum, count)`` of the network's loss on a batch, and perhaps its parts.
        batch_at: Returns a batch by its number, from 0; a step takes ``accumulate`` of them.
        evaluate: Judges the network on held-out data.
        config: How.
        folder: Where the checkpoints lie.
        stop: Asked after every step; True ends the training there, with a checkpoint.
        score: Of an evaluation, the lower the better; for ``patience`` and ``keep_best``.
        quick: The loss is a function of arrays alone, and may run as ``QuickSteps``.

    Raises:
        InputError: If the loss is not a number; the last checkpoint is from before.
    """
    run = _Run(network, loss, config, folder, score, quick)
    while not (run.is_done or run.best.enough):
        progress = run.update(batch_at)
        progress.stopped = stop()
        if run.is_done or run.step % config.evaluate_every == 0:
            run.read(progress)
            progress.evaluation = evaluate()
            run.check(progress, progress.evaluation, "held-out ")
            run.best.see(run.step, progress.evaluation, run.masters)
        progress.ended = run.is_done or run.best.enough
        due = run.step % config.checkpoint_every == 0
        progress.saves = progress.ended or due or progress.stopped
        if progress.saves or run.step % READ_EVERY == 1:
            run.read(progress)
        yield progress  # what the caller keeps of a step is there before its checkpoint is
        if progress.saves:
            run.save()
        if progress.stopped and not progress.ended:
            return
    run.best.take_back(run.masters)


class _Run:
    """A training's state: weights, moments, and what is kept beside them."""

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        folder: Path,
        score: Score,
        quick: bool,
    ):
        self.network = network
        self.config = config
        self.folder = folder
        self.masters = Masters(network)
        # Without the bias correction the first steps are several times the rate.
        rate = schedule(config)
        self.optimizer = optim.AdamW(
            learning_rate=0.0 if config.max_minutes else rate,  # else time decides, step by step
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.masters.arrays)
        self.best = Best(folder, config, score)
        self.gradients = Gradients(network, loss, self.masters.has_float16)
        self._rate = rate
        self._elapsed_s, self._since = 0.0, None
        self._numbers: tuple[mx.array, mx.array, mx.array] | None = None
        self._last_loss = math.nan
        self.step, weights, state = restore(folder)
        if self.step:
            if not {"optimizer", "best", "scale"} <= state.keys():
                raise InputError(
                    f"the checkpoints in {folder} are of another version; train in another folder"
                )
            checkpoint = checkpoint_of(folder, self.step)
            remedy = f"without {checkpoint} the training goes on from the checkpoint before"
            check_arrays(checkpoint / NETWORK, weights, self.masters.kept(), remedy)
            kept = {"optimizer": self.optimizer.state, "best": self.best.state}
            kept |= {"scale": mx.array(self.gradients.scale)}
            check_arrays(checkpoint / OPTIMIZER, state, kept, remedy)
            self.masters.restore(weights)
            self.optimizer.state = state["optimizer"]
            self.best.state = state["best"]
            self.best.check(self.masters)
            self.gradients.scale = float(to_number(state["scale"]))
            self._elapsed_s = float(to_number(state.get("elapsed_s", mx.array(0.0))))
            mx.eval(network.parameters(), self.masters.arrays, self.optimizer.state)
        self.is_done = self.share >= 1
        self._quick: QuickSteps | None = None
        if quick and config.accumulate == 1 and not self.masters.has_float16:
            self._quick = QuickSteps(
                network, loss, self.masters, self.optimizer, config.max_grad_norm
            )

    @property
    def share(self) -> float:
        """How much of the training is over, by steps or by time."""
        done = self.step / self.config.steps
        if self.config.max_minutes is None:
            return done
        return min(1.0, max(done, self.elapsed_s / (60 * self.config.max_minutes)))

    @property
    def elapsed_s(self) -> float:
        """How long it has been training."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._elapsed_s + running

    def update(self, batch_at: Callable[[int], Any]) -> Progress:
        """Do a step."""
        if self.config.max_minutes is not None:
            self.optimizer.learning_rate = self._rate(mx.array(self.share * self.config.steps))
        start = time.perf_counter()
        progress = self._quickly(batch_at) if self._quick else self._update(batch_at)
        self._since = self._since or time.perf_counter()  # behind what only the first step does
        progress.seconds = time.perf_counter() - start
        progress.share = self.share
        self.is_done = progress.share >= 1
        return progress

    def _quickly(self, batch_at: Callable[[int], Any]) -> Progress:
        assert self._quick is not None
        self._numbers = self._quick(batch_at(self.step))
        self.step += 1
        return Progress(self.step, self._last_loss)

    def read(self, progress: Progress) -> None:
        """Wait for a quick step, and say what its numbers are."""
        if self._numbers is None:
            return
        loss, count, norm = (float(to_number(number)) for number in self._numbers)
        self._numbers = None
        progress.loss, progress.count, self._last_loss = loss, count, loss
        progress.learning_rate = float(to_number(self.optimizer.learning_rate))
        self.check(progress, {"loss": loss, "gradient": norm})

    def _update(self, batch_at: Callable[[int], Any]) -> Progress:
        """Do a step, on ``accumulate`` batches."""
        accumulate = self.config.accumulate
        first = self.step * accumulate
        sums = self.gradients.sums(batch_at(first + place) for place in range(accumulate))
        loss, parts = sums.means()
        progress = Progress(self.step + 1, loss, sums.rows, sums.count, parts=parts)
        grads, norm = clipped(sums.mean_gradients(), self.config.max_grad_norm)
        self.check(progress, {"loss": progress.loss, "gradient": float(to_number(norm))})
        self.masters.put(updated(self.optimizer, grads, self.masters.arrays))
        mx.eval(self.network.parameters(), self.masters.arrays, self.optimizer.state)
        progress.learning_rate = float(to_number(self.optimizer.learning_rate))
        self.step += 1
        return progress

    def check(self, progress: Progress, numbers: dict[str, Any], kind: str = "") -> None:
        """Raise InputError if one is no number; a loss and a gradient must be finite, too."""
        for name, number in numbers.items():
            if not isinstance(number, float) or math.isfinite(number):
                continue
            if kind and not math.isnan(number):
                continue
            rows = f", on rows {progress.rows} of the data" if progress.rows else ""
            raise InputError(
                f"the {kind}{name} of step {progress.step} is {number}{rows}; "
                f"{last_good(self.folder)}; a smaller learning rate may help"
            )

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            "optimizer": self.optimizer.state,
            "best": self.best.state,
            "scale": mx.array(self.gradients.scale),
            "elapsed_s": mx.array(self.elapsed_s),
        }
        save(self.folder, self.step, self.masters.kept(), state)


@contextmanager
def stopping(message: str) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the training after the step that runs, with a checkpoint.

    The second one ends it at once. Only the main thread hears of Ctrl-C.

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
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
