"""Medusa heads out of folders."""

from pathlib import Path

from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.folders import fill, read_shape
from mlx_distill.drafters.medusa import MedusaConfig, MedusaHeads
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields


def load(path: Path, fields: Fields, target: Target, made_for: Fingerprint) -> MedusaDrafter:
    """Return the heads of a folder, ready to draft; see ``recurrent_folder.load``."""
    shape, quantization = read_shape(MedusaConfig, path, fields, made_for, ("vocab_size",))
    network = MedusaHeads(shape)
    fill(network, path, quantization, target)
    return MedusaDrafter(network, made_for)
