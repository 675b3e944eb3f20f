"""What the examples with classifiers share: images, small networks, runs over seeds, results.

Images are uint8, (N, height, width, channels); the networks scale them themselves.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
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
from mlx_distill.cli import commit, machine, versions
from mlx_distill.distillation.judgement import judge
from mlx_distill.distillation.teachers import Answers, LiveTeacher


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
        self.layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
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


def load_images(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, channels last, and labels of the split's ``.npz`` files.

    Raises:
        InputError: If there are none, or one of them holds no ``x`` and ``y`` that fit.
    """
    paths = sorted(Path(folder).glob(f"{split}*.npz"))
    if not paths:
        raise InputError(f"{folder} holds no {split}*.npz; name the folder that does with --data")
    images, labels = [], []
    for path in paths:
        with np.load(path) as arrays:
            if "x" not in arrays or "y" not in arrays or len(arrays["x"]) != len(arrays["y"]):
                raise InputError(f"{path} must hold images x and as many labels y")
            images.append(arrays["x"])
            labels.append(arrays["y"].astype(np.int32))
    x, y = np.concatenate(images), np.concatenate(labels)
    return (x if x.ndim == 4 else x[..., None]), y


def examples(images: np.ndarray, labels: np.ndarray, most: int | None = None) -> Examples:
    """Return images and labels as examples, the first ``most`` of them."""
    return Examples.of(mx.array(images[:most]), mx.array(labels[:most]))


def fit(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: Examples,
    losses: Sequence[str],
    training: TrainingConfig,
    **options: Any,
) -> nn.Module:
    """Return the student after a training; without teachers it learns the labels alone."""
    with tempfile.TemporaryDirectory() as folder:
        mlx_distill.distill(
            student,
            list(teachers) or None,
            data,
            folder=folder,
            losses=losses,
            training=training,
            **options,
        )
    return student


def figures(network: nn.Module, data: Examples, teachers: Sequence[nn.Module]) -> dict[str, float]:
    """Return a network's ``accuracy`` and ``nats``, and its ``kl`` to the teachers' mean."""
    slices = (
        data.take(range(start, min(start + 500, data.labels.size)))
        for start in range(0, data.labels.size, 500)
    )
    network.eval()
    return judge(Answers(network, False), LiveTeacher(teachers, False), slices, with_accuracy=True)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation over seeds (0 for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
