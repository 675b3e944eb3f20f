"""The best network of a training, by what is held out, and when waiting for a better one ends."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.arrays import to_number
from mlx_distill.errors import InputError
from mlx_distill.files import write_arrays
from mlx_distill.safetensors import check_safetensors, read_arrays
from mlx_distill.training.checkpoints import NETWORK, check_arrays
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.masters import Masters

Score = Callable[[dict[str, Any]], float | None]
BEST = "best"


def held_out_score(evaluation: dict[str, Any]) -> float | None:
    """Return the divergence from the teacher, or the nats where there is none to diverge from."""
    return evaluation.get("kl", evaluation.get("nats"))


def kept_step(log: Sequence[Mapping[str, Any]], config: TrainingConfig) -> int:
    """Return the step whose weights a training has ended with; ``log`` has a row for each."""
    scores = {row["step"]: held_out_score(row.get("held_out", {})) for row in log}
    judged = {step: np.float32(score) for step, score in scores.items() if score is not None}
    if not (config.keep_best and judged):
        return log[-1]["step"]
    return min(judged, key=lambda step: judged[step])  # of equal ones the first


class Best:
    """Keeps the best network so far in ``folder / "best"``.

    Args:
        folder: Of the training.
        config: Says how patient to be, and whether to keep the best one.
        score: Of an evaluation; the lower, the better.

    Attributes:
        state: What a checkpoint keeps of this.
    """

    def __init__(self, folder: Path, config: TrainingConfig, score: Score):
        self._folder = folder / BEST
        self._config = config
        self._score = score
        self.state = {"score": mx.array(mx.inf), "step": mx.array(0), "waited": mx.array(0)}

    @property
    def enough(self) -> bool:
        """Whether so many evaluations were no better that the training ends."""
        return 0 < self._config.patience <= to_number(self.state["waited"])

    def see(self, step: int, evaluation: dict[str, Any], masters: Masters) -> None:
        """Keep the network if it is the best so far.

        Raises:
            InputError: If nothing was held out, so that none is better than another.
        """
        if not (self._config.patience or self._config.keep_best):
            return
        score = self._score(evaluation)
        if score is None:
            raise InputError("patience and keep_best need held-out data, by which to judge")
        score = to_number(mx.array(score))  # rounded as a kept one is: an equal one is no better
        if score < to_number(self.state["score"]):
            self.state = {"score": mx.array(score), "step": mx.array(step), "waited": mx.array(0)}
            if self._config.keep_best:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_arrays(self._folder / NETWORK, masters.kept())
        else:
            self.state["waited"] = self.state["waited"] + 1

    def check(self, masters: Masters) -> None:
        """Raise InputError if the best network of a training that goes on is not there any more."""
        if self._config.keep_best and to_number(self.state["step"]) > 0:
            self._read(masters)

    def take_back(self, masters: Masters) -> None:
        """Give the network its best weights, if they are to be kept."""
        if self._config.keep_best:
            masters.restore(self._read(masters))

    def _read(self, masters: Masters) -> dict[str, mx.array]:
        path = self._folder / NETWORK
        remedy = f"remove {self._folder.parent} to begin anew"
        try:
            check_safetensors(path)
        except InputError as error:
            raise InputError(f"the best network is lost: {error}; {remedy}") from None
        arrays = read_arrays(path)
        check_arrays(path, arrays, masters.kept(), remedy)
        return arrays
