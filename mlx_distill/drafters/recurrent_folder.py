"""Recurrent drafters out of folders."""

from pathlib import Path

from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.folders import fill, read_shape
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.drafters.shortlist import read_directions
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields

FREE = ("vocab_size", "context_window")


def load(path: Path, fields: Fields, target: Target, made_for: Fingerprint) -> BoundDrafter:
    """Return the drafter of a folder, bound to a target.

    Args:
        path: The folder.
        fields: Its configuration, without its kind and its target.
        target: What it is going to draft for.
        made_for: Fingerprint of the target that it was trained for.

    Raises:
        InputError: If the configuration, the weights or the vocabulary do not fit.
    """
    shape, quantization = read_shape(RecurrentDrafterConfig, path, fields, made_for, FREE)
    network = RecurrentDrafter(shape)
    fill(network, path, quantization, target)
    assert target.embed is not None
    directions = read_directions(path, network.head.weight.shape[1])
    return BoundDrafter(network, target.embed, made_for, directions=directions)
