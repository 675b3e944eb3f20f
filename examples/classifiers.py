"""What the examples with classifiers share: images, small networks, runs over seeds, results.

Images are uint8, (N, height, width, channels); the networks scale them themselves.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx_distill  # before mlx: on Linux it brings the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mlx_distill import Examples, InputError, TrainingConfig
from mlx_distill.distillation.judgement import judge
from mlx_distill.distillation.teachers import Answers, LiveTeacher
from mlx_distill.errors import one_line
from mlx_distill.machine import provenance


class Block(nn.Module):
    """A 3x3 convolution, a batch normalisation and a ReLU; perhaps half the height and width."""

    def __init__(self, inputs: int, outputs: int, halves: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm(outputs)
        self.halves = halves

    def __call__(self, x: mx.array) -> mx.array:
        """Return the block's features, channels last."""
        x = nn.relu(self.norm(self.conv(x)))
        return nn.MaxPool2d(2)(x) if self.halves else x


class ConvNet(nn.Module):
    """Blocks of convolutions, the mean over all places, and a linear head.

    A square of 2x2 pixels is one place for the first block: a quarter of the work.

    Args:
        channels: Of an image.
        widths: Of the blocks.
        halving: The blocks that halve the height and width.
        num_classes: Number of logits.
        dropout: Share of the last features that are dropped in training.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        halving: Sequence[int],
        num_classes: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        inputs = [4 * channels, *widths]
        self.layers = [
            Block(inputs[place], width, place in halving) for place, width in enumerate(widths)
        ]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def __call__(self, images: mx.array) -> mx.array:
        """Return the logits, (B, C)."""
        batch, height, width, channels = images.shape
        if height % 2 or width % 2:
            raise InputError(f"images must have even sides, got {height} x {width}")
        x = images.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels).astype(mx.float32)
        x = x / 127.5 - 1
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x.mean(axis=(1, 2))))


class Perceptron(nn.Module):
    """Linear layers with ReLUs between them.

    Args:
        sizes: Of the image, every hidden layer, and the logits.
        dropout: Share of the hidden units that are dropped in training.
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        self.dropout = nn.Dropout(dropout)

    def __call__(self, images: mx.array) -> mx.array:
        """Return the logits, (B, C)."""
        x = images.reshape(images.shape[0], -1).astype(mx.float32) / 255
        for layer in self.layers[:-1]:
            x = self.dropout(nn.relu(layer(x)))
        return self.layers[-1](x)


def jitter(shift: int, flip: bool = False) -> Callable[[Examples, int], Examples]:
    """Return what moves the images of a batch by up to ``shift`` pixels, and mirrors half of them.

    What it does is drawn from the batch's number alone.
    """

    def augment(batch: Examples, number: int) -> Examples:
        draw = np.random.default_rng(number)
        images = np.array(batch.inputs)
        count, height, width, _ = images.shape
        padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
        corners = draw.integers(0, 2 * shift + 1, (count, 2))
        moved = np.stack(
            [
                image[top : top + height, left : left + width]
                for image, (top, left) in zip(padded, corners, strict=True)
            ]
        )
        if flip:
            mirrored = draw.random(count) < 0.5
            moved[mirrored] = moved[mirrored, :, ::-1]
        return Examples(mx.array(moved), batch.labels, batch.mask, batch.rows)

    return augment


def load_images(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the images, their labels and the classes' names, from the split's ``.npz`` files.

    Raises:
        InputError: If there are none, or one of them cannot be read, or holds no images ``x`` of
            one size and ``y`` of the same length.
    """
    paths = sorted(Path(folder).glob(f"{split}*.npz"))
    if not paths:
        raise InputError(f"{folder} holds no {split}*.npz; name the folder that does with --data")
    images, labels, names = [], [], None
    for path in paths:
        arrays = read_arrays(path)
        if "x" not in arrays or "y" not in arrays or len(arrays["x"]) != len(arrays["y"]):
            raise InputError(f"{path} must hold images x and as many labels y")
        images.append(arrays["x"])
        if images[0].ndim not in (3, 4) or images[-1].shape[1:] != images[0].shape[1:]:
            raise InputError(f"{path} must hold images x of one size, got {images[-1].shape}")
        labels.append(arrays["y"].astype(np.int32))
        names = arrays["classes"].tolist() if "classes" in arrays else names
    x, y = np.concatenate(images), np.concatenate(labels)
    return (x if x.ndim == 4 else x[..., None]), y, names or [str(n) for n in range(y.max() + 1)]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file.

    Raises:
        InputError: If it is none, or holds Python's objects, which are not unpacked.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as arrays: {one_line(error)}") from None


def load_splits(
    folder: str | Path, tune: bool
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[str]]:
    """Return images and labels to learn, others to judge by, and the classes' names.

    Args:
        folder: Holds ``train*.npz`` and ``test*.npz``.
        tune: Judge by the last sixth of the training images, and learn the others: for choosing a
            learning rate without a look at the test.
    """
    images, labels, names = load_images(folder, "train")
    check_labels(labels, names, "train")
    if not tune:
        tests, test_labels, _ = load_images(folder, "test")
        check_labels(test_labels, names, "test")
        return (images, labels), (tests, test_labels), names
    cut = len(images) * 5 // 6
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), names


def check_labels(labels: np.ndarray, names: Sequence[str], split: str) -> None:
    """Raise InputError if labels are not of the classes that are learned."""
    wrong = labels[(labels < 0) | (labels >= len(names))]
    if wrong.size:
        raise InputError(
            f"the {split} images have the label {wrong[0]}, but {len(names)} classes are learned"
        )


def as_examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    """Return images and labels as examples."""
    return Examples.of(mx.array(images), mx.array(labels))


def fit(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: Examples,
    losses: Sequence[str],
    settings: dict[str, Any],
    **options: Any,
) -> nn.Module:
    """Return the student after a training; without teachers there are the labels alone.

    Args:
        student: It is trained in place.
        teachers: They answer with the mean of their probabilities.
        data: What is learned.
        losses: As ``distill`` takes them.
        settings: ``batch_size``, and what ``TrainingConfig`` takes.
        options: Others of ``distill``.
    """
    config = dict(settings)
    batch_size, steps = config.pop("batch_size"), config["steps"]
    training = TrainingConfig(**config, evaluate_every=steps, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        done = mlx_distill.distill(
            student,
            teachers or None,
            data,
            folder=folder,
            losses=losses,
            training=training,
            batch_size=batch_size,
            **options,
        )
    if not done.finished:
        raise KeyboardInterrupt
    return student


def judged(network: nn.Module, data: Examples, teachers: Sequence[nn.Module]) -> dict[str, float]:
    """Return a network's accuracy, nats, and KL(teachers || network), in nats."""
    starts = range(0, data.labels.size, 500)
    slices = (data.take(range(start, min(start + 500, data.labels.size))) for start in starts)
    network.eval()
    return judge(Answers(network, False), LiveTeacher(teachers, False), slices, texts=False)


@dataclass(frozen=True)
class Runs:
    """A figure of the same training with several seeds."""

    values: list[float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; of a single one there is none."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def cell(self, form: str) -> str:
        """Return mean and spread for a table; ``form`` as in ``format``."""
        spread = "" if self.spread is None else f" ± {self.spread:{form}}"
        return f"{self.mean:{form}}{spread}"

    def to_json(self) -> dict[str, Any]:
        """Return what a JSON file holds of it."""
        return {"mean": self.mean, "spread": self.spread, "values": self.values}


def over_seeds(name: str, seeds: int, run: Callable[[int], dict[str, float]]) -> dict[str, Runs]:
    """Return the figures of a training that is run with several seeds."""
    rows = []
    for seed in range(seeds):
        print(f"{name}, seed {seed}", file=sys.stderr)
        rows.append(run(seed))
    return {key: Runs([row[key] for row in rows]) for key in rows[0]}


def widest(*runs: Runs) -> float | None:
    """Return the largest of the spreads; None if there was but one seed."""
    spreads = [one.spread for one in runs if one.spread is not None]
    return max(spreads, default=None)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of all these examples."""
    flags = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    flags.add_argument("--data", required=True, help="folder of train*.npz and test*.npz")
    flags.add_argument("--seeds", type=int, default=3, help="trainings per row (default: 3)")
    flags.add_argument("--json", metavar="FILE", help="write everything to this file")
    flags.add_argument("--steps", type=int, help="of every training, to try things out")
    flags.add_argument("--rate", type=float, help="the students' learning rate (default: the best)")
    flags.add_argument(
        "--tune",
        action="store_true",
        help="judge by training images that are not learned, to choose a rate",
    )
    flags.add_argument("--train", type=int, help="most images to learn from")
    flags.add_argument("--test", type=int, help="most images to judge by")
    return flags


def parsed(flags: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments.

    Raises:
        InputError: If a number is out of its range, or the JSON file's folder does not exist.
    """
    arguments = flags.parse_args(argv)
    for name in ("seeds", "steps", "train", "test"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if arguments.rate is not None and not 0 < arguments.rate < 1:
        raise InputError(f"rate must lie between 0 and 1, got {arguments.rate}")
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise InputError(f"{arguments.json} cannot be written: its folder does not exist")
    return arguments


def with_flags(
    settings: dict[str, Any], steps: int | None, rate: float | None = None
) -> dict[str, Any]:
    """Return a training's settings; with other steps or another rate, if they were asked for."""
    asked = {"steps": steps, "learning_rate": rate}
    return settings | {name: value for name, value in asked.items() if value is not None}


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True, width=100).print(table)


def keep(path: str | None, start_s: float, settings: dict[str, Any], **results: Any) -> None:
    """Write results, and what they depend on, to a JSON file, if there is to be one.

    Args:
        path: The file; None writes nothing.
        start_s: What ``time.perf_counter`` said at the start.
        settings: Of the trainings.
        results: What came out.
    """
    if path is None:
        return
    seconds = {"wall_s": time.perf_counter() - start_s, "cpu_s": time.process_time()}
    everything = {**provenance(), **seconds, "settings": settings, **results}
    text = json.dumps(everything, indent=1, default=Runs.to_json)
    Path(path).write_text(text + "\n", encoding="utf-8")
