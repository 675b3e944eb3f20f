"""What the examples with classifiers share: images, small networks, runs over seeds, results.

Images are uint8 (N, height, width, channels); the networks bring them to -1..1 themselves.
"""

from collections.abc import Sequence

# isort: split
import mlx.core as mx
from mlx import nn


class ConvNet(nn.Module):
    """Blocks of a 3x3 convolution, a normalisation and a ReLU, then the mean over all places.

    Args:
        channels: Of the image.
        widths: Of every block; below all but the first, places are halved by their maximum.
        num_classes: Logits.
        dropout: Share of the last block's channels that is left out in training.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], num_classes: int, dropout: float = 0.0
    ):
        super().__init__()
        ins = [4 * channels, *widths]
        self.layers = [Block(*pair) for pair in zip(ins[:-1], widths, strict=True)]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def __call__(self, images: mx.array) -> mx.array:
        """Return the logits, (B, C)."""
        x = _scaled(images)
        batch, height, width, channels = x.shape
        # A square of 2x2 pixels is one place: a quarter of the work in the first block.
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x.mean(axis=(1, 2))))
