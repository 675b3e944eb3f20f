"""The folder of a drafter that learns from use: whose it is, what is in it, how it is written.

Every file appears whole. The drafter's weights are replaced last, so what a kill leaves behind is
one round's weights or the next one's.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.folders import configuration
from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_json, usable_path, write_arrays, write_whole
from mlx_distill.locks import locked
from mlx_distill.safetensors import check_safetensors, read_arrays

MANIFEST, CONFIG = "learning.json", "config.json"
WEIGHTS, MOMENTS, TEXTS, LOCK = "model.safetensors", "optimizer.safetensors", "texts", "lock"
FORMAT_VERSION = 1
COUNTS = "answers", "kept", "taken_back"
RESET = "--reset-learning starts anew"


@dataclass(frozen=True)
class Learned:
    """What became of a round.

    Args:
        steps: How many were taken.
        before: Drafted tokens of a chain that the target takes, on held-out answers; the mean of
            greedy texts and texts at temperature 1.
        after: The same behind the steps.
    """

    steps: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the drafter is the new one."""
        return self.after >= self.before

    def __str__(self) -> str:
        kept = "kept" if self.kept else "taken back"
        return (
            f"learned in {self.steps} steps: {self.before:.3f} drafted tokens per call before, "
            f"{self.after:.3f} now, on held-out answers; {kept}"
        )


class LearningFolder:
    """What one drafter has learned with one target.

    Args:
        path: The folder; it exists, and no other run writes to it.
        known: What drafter and target are known by.

    Attributes:
        record: What ``learning.json`` holds.

    Raises:
        InputError: If it holds something else, or what another drafter or target has learned.
    """

    def __init__(self, path: Path, known: Mapping[str, Any]):
        self.path, self.texts = path, path / TEXTS
        new = {"format_version": FORMAT_VERSION, **known, **dict.fromkeys(COUNTS, 0)}
        if not _is_learning(path):
            self.record: dict[str, Any] = new
            return
        self.record = read_json(path / MANIFEST)
        if self.record.get("format_version") != FORMAT_VERSION or any(
            type(self.record.get(name)) is not int for name in COUNTS
        ):
            raise self.damaged(f"its {MANIFEST} does not say what it has to")
        for name, other in (("drafter", "another drafter"), ("target", "a model of other weights")):
            if self.record.get(name) != known[name]:
                raise InputError(
                    f"{path} holds what {other} has learned; name another folder, or {RESET}"
                )

    @classmethod
    @contextmanager
    def held(cls, folder: str | Path, known: Mapping[str, Any]) -> Iterator["LearningFolder"]:
        """Yield a folder that no other run uses meanwhile; it is made if it is not there.

        Raises:
            InputError: If another does, or it cannot be written to.
        """
        path = usable_path(folder, "the learning folder")
        with _locked(path):
            yield cls(path, known)

    def damaged(self, why: str) -> InputError:
        """Return the error of a folder that is of no use any more."""
        return InputError(f"{self.path} is damaged: {why}; {RESET}")

    def weights(self) -> dict[str, mx.array] | None:
        """Return the drafter's weights, in float32; None if nothing was learned yet."""
        return read_arrays(self.path / WEIGHTS) if self._has(WEIGHTS) else None

    def moments(self, expected: Mapping[str, mx.array]) -> dict[str, mx.array] | None:
        """Return the optimizer's moments, of the same shapes; None if there are none."""
        if not self._has(MOMENTS):
            return None
        found = read_arrays(self.path / MOMENTS)
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in expected.items()}:
            raise self.damaged(f"{MOMENTS} is another drafter's")
        return found

    def _has(self, name: str) -> bool:
        file = self.path / name
        if not file.exists():
            return False
        try:
            check_safetensors(file)
        except InputError as error:
            raise self.damaged(str(error)) from None
        return True

    def write(self) -> None:
        """Write the record."""
        try:
            write_whole(self.path / MANIFEST, json.dumps(self.record, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {one_line(error)}") from None

    def save(
        self, network: RecurrentDrafter, target: Fingerprint, moments: dict[str, mx.array]
    ) -> None:
        """Write the drafter and its moments."""
        config = configuration(network, {**target, "vocab_size": network.config.vocab_size})
        try:
            write_whole(self.path / CONFIG, json.dumps(config, indent=2))
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {one_line(error)}") from None
        write_arrays(self.path / MOMENTS, moments)
        weights: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
        write_arrays(self.path / WEIGHTS, weights)


def reset_learning(folder: str | Path) -> None:
    """Forget all that was learned in a folder; other files in it stay.

    Raises:
        InputError: If it holds something else, or another run uses it.
    """
    path = usable_path(folder, "the learning folder")
    if not path.exists():
        return
    with _locked(path):
        if not _is_learning(path):
            return
        for name in (WEIGHTS, MOMENTS, CONFIG):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / TEXTS, ignore_errors=True)
        (path / MANIFEST).unlink()  # last: until then it is known what to forget


def _is_learning(path: Path) -> bool:
    """Return whether a folder holds what was learned, or nothing.

    Raises:
        InputError: If it holds something else.
    """
    if (path / MANIFEST).exists():
        return True
    if any(file.name != LOCK for file in path.iterdir()):
        raise InputError(f"{path} holds something else than what was learned; name another folder")
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(0, "it is read-only")
            stack.enter_context(locked(path / LOCK, path))
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise InputError(f"nothing can be learned in {path}: {reason}") from None
        yield
