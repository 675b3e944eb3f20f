"""What a training leaves to be read: a log, curves, and calls to mlx-lm's reporting callbacks.

``log.jsonl`` gets a row with every step, and what that took: tokens per second, and the largest
memory so far. What a kill leaves of a row, and rows of steps that a resumed run does again, are cut
off first. ``log.csv`` and ``curves.png`` are made of it at the end.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import InputError
from mlx_distill.files import naming, read_jsonl, write_whole
from mlx_distill.names import for_plot
from mlx_distill.training.loop import Progress

LOG, TABLE, CURVES = "log.jsonl", "log.csv", "curves.png"
MEASURED = "measured"  # of a row: what no other run would measure alike
NUMBERS = ("loss", "count", "learning_rate")


class Journal:
    """The log of a training.

    Args:
        folder: Where it lies; what an earlier run wrote of the steps before is kept.
        step: Steps that are done.
        callback: An mlx-lm ``TrainingCallback``, or None.
        parts: The terms of the loss, of which every row has the numbers.

    Raises:
        InputError: If a step that is done has no row, or a damaged one.
    """

    def __init__(self, folder: Path, step: int, callback: Any = None, parts: Sequence[str] = ()):
        self.folder = folder
        self.callback = callback
        self._path = folder / LOG
        kept = self._cut_back(step, [*NUMBERS, *parts])
        self.rows = [{name: x for name, x in row.items() if name != MEASURED} for row in kept]
        self.count = sum(row["count"] for row in self.rows)

    def add(self, progress: Progress) -> dict[str, Any]:
        """Note a step, and tell the callback."""
        seconds = progress.seconds
        self.count += progress.count
        row = {
            "step": progress.step,
            "loss": progress.loss,
            "count": progress.count,
            "learning_rate": progress.learning_rate,
            **progress.parts,
        }
        if progress.evaluation:
            row["held_out"] = progress.evaluation
        self.rows.append(row)
        measured = {
            "tokens_per_second": progress.count / max(seconds, 1e-9),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, MEASURED: measured}) + "\n")
        if self.callback is not None:
            self._report(progress, seconds)
        return row

    def _cut_back(self, step: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows up to a step, and leave nothing else in the file."""
        if not step:
            self._path.unlink(missing_ok=True)
            return []
        content = self._path.read_bytes() if self._path.exists() else b""
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self._path, end)
        kept = read_log(self._path, step, range(1, step + 1), names)
        if len(kept) < content.count(b"\n"):
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def _report(self, progress: Progress, seconds: float) -> None:
        """Call back as mlx-lm's own trainer does, with its names."""
        self.callback.on_train_loss_report(
            {
                "iteration": progress.step,
                "train_loss": progress.loss,
                "learning_rate": progress.learning_rate,
                "iterations_per_second": 1 / max(seconds, 1e-9),
                "tokens_per_second": progress.count / max(seconds, 1e-9),
                "trained_tokens": int(self.count),
                "peak_memory": mx.get_peak_memory() / 1e9,
                **progress.parts,
            }
        )
        if progress.evaluation:
            found = progress.evaluation
            self.callback.on_val_loss_report(
                {"iteration": progress.step, "val_loss": found.get("nats"), **found}
            )


def read_log(
    path: Path, step: int, due: Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of an unfinished training's log, those of later steps left out.

    Args:
        path: The log.
        step: The last that a checkpoint has.
        due: Steps that must have a row; the last one may have one, too.
        names: Numbers, or lists of some, of every row.

    Raises:
        InputError: If there is no such log, or a row is missing or damaged.
    """
    if not (step and (due or path.exists())):
        return []
    anew = f"remove {path.parent} to begin anew"
    if not path.exists():
        raise InputError(f"{path} is missing, the log of {step} steps that are done; {anew}")
    try:
        rows = [row for _, row in read_jsonl(path)]
    except InputError as error:
        raise InputError(f"the log is damaged: {error}; {anew}") from None
    for number, row in enumerate(rows, start=1):
        if type(row.get("step")) is not int or not all(_is_number(row.get(n)) for n in names):
            raise InputError(f"{path} is damaged: row {number} is not that of a step; {anew}")
    kept = [row for row in rows if row["step"] <= step]
    found = [row["step"] for row in kept]
    if found not in ([*due], [*dict.fromkeys([*due, step])]):
        lost = [one for one in due if one not in found]
        why = f"it lacks step {lost[0]}, which is done" if lost else "its steps are out of order"
        raise InputError(f"{path} is damaged: {why}; {anew}")
    return kept


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a log as CSV; what was not measured on a step is left empty."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss, its parts and the held-out figures over the steps, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    known = ("step", "count", "learning_rate", "held_out")
    names = [name for name in rows[-1] if name not in known]
    names = names[:1] if len(names) == 2 else names  # of one part, the loss says it
    panels = {"training loss": [(name, steps, [row.get(name) for row in rows]) for name in names]}
    judged = [row for row in rows if "held_out" in row]
    for names in (("nats", "kl"), ("accuracy", "agreement")):
        lines = [
            (name, [row["step"] for row in judged], [row["held_out"][name] for row in judged])
            for name in names
            if judged and name in judged[-1]["held_out"]
        ]
        if lines:
            panels[f"held out: {', '.join(name for name, _, _ in lines)}"] = lines
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axis, (label, lines) in zip(axes[0], panels.items(), strict=True):
        for name, at, values in lines:
            axis.plot(at, values, label=name, linewidth=1, marker="o" if len(at) < 50 else None)
        values = [value for _, _, every in lines for value in every if value is not None]
        if min(values) > 0 and max(values) > 30 * min(values):  # parts of different scales
            axis.set_yscale("log")
        axis.set(title=label, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    figure.suptitle(for_plot(title))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    held_out = {f"held_out_{k}": v for k, v in row.get("held_out", {}).items()}
    return {k: v for k, v in row.items() if k != "held_out"} | held_out
