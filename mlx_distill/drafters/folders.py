"""Trained drafters in and out of folders: what all kinds have in common.

A folder holds ``config.json``, ``model.safetensors`` and a model card. The configuration names the
drafter's kind and its target, and holds the fields of its shape.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.arrays import all_finite, to_host
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.networks import Network, Shape, change_shape
from mlx_distill.drafters.packing import unpacked
from mlx_distill.drafters.shortlist import FILE, Directions
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import whole_folder, write_whole
from mlx_distill.model_folder import check_quantization
from mlx_distill.safetensors import check_floats, read_arrays, read_header
from mlx_distill.target.target import Target

FORMAT_VERSION = 1
S = TypeVar("S", bound=Shape)


def read_shape(
    kind: type[S], path: Path, fields: dict[str, Any], made_for: Fingerprint, free: tuple[str, ...]
) -> tuple[S, dict[str, Any] | None]:
    """Return the shape of a folder's drafter, and how its weights are packed.

    Args:
        kind: Of shape.
        path: The folder.
        fields: Its configuration, without its kind and its target.
        made_for: Fingerprint of the target that it was trained for.
        free: Fields that no array of the file is as wide as.

    Raises:
        InputError: If the configuration is none, or asks for more than the file holds; nothing is
            built before.
    """
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, expected {FORMAT_VERSION}")
    quantization = fields.pop("quantization", None)
    check_quantization(quantization, path / "config.json")
    shape = kind.from_dict(fields)
    group_size = (quantization or {}).get("group_size", 1)
    _check_sizes(shape, weights_of(path), made_for, group_size, free)
    return shape, quantization


def fill(network: Network, path: Path, quantization: dict[str, Any] | None, target: Target) -> None:
    """Give a network the weights of a folder, in the target's type.

    Args:
        network: Of the folder's shape.
        path: The folder.
        quantization: How the weights are packed; None if they are not.
        target: What it is going to draft for.

    Raises:
        InputError: If the weights or the vocabulary do not fit, or are no finite numbers.
    """
    weights = weights_of(path)
    arrays = read_arrays(weights)
    try:
        arrays = unpacked(arrays, quantization) if quantization else arrays
        network.load_weights(list(arrays.items()))
        mx.eval(network.parameters())
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{weights} does not fit its config: {one_line(error)}") from None
    check_floats({name: x for name, x in arrays.items() if name != "token_ids"}, weights)
    assert target.embed is not None
    _fit_vocabulary(network, min(target.vocab_size, target.embed["weight"].shape[0]), weights)
    network.set_dtype(target.embed(mx.array([0])).dtype)
    network.eval()
    mx.eval(network.parameters())
    _check_numbers(network, weights)


def save_drafter(
    folder: Path,
    network: Network,
    target: Fingerprint,
    files: dict[str, str],
    directions: Directions | None = None,
) -> None:
    """Write a drafter's folder; it appears complete or not at all.

    Args:
        folder: Must not exist.
        network: The drafter; written in its type, in which it was judged.
        target: The fingerprint of its target.
        files: Further text files by name, the model card among them.
        directions: That the head's inputs lie in, for a shortlist; None to write none.

    Raises:
        InputError: If it cannot be written; nothing is left behind.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    with whole_folder(folder) as writing:
        config = configuration(network, target)
        write_whole(writing / "config.json", json.dumps(config, indent=2))
        for name, text in files.items():
            write_whole(writing / name, text)
        mx.save_safetensors(str(weights_of(writing)), weights, {"format": "mlx"})
        if directions is not None:
            halves = {name: x.astype(mx.bfloat16) for name, x in directions._asdict().items()}
            mx.save_safetensors(str(writing / FILE), halves, {"format": "mlx"})


def configuration(network: Network, target: Fingerprint) -> dict[str, Any]:
    """Return what ``config.json`` says of a drafter and its target."""
    shape = network.config
    fields = {k: v for k, v in vars(shape).items() if v is not None}
    kind = {"model_type": shape.model_type, "format_version": FORMAT_VERSION}
    return {**kind, **fields, "target": target}


def weights_of(folder: Path) -> Path:
    """Return where a folder has its weights."""
    return folder / "model.safetensors"


def _check_sizes(
    shape: Shape, weights: Path, made_for: Fingerprint, group_size: int, free: tuple[str, ...]
) -> None:
    """Raise InputError if a configuration asks for more than its file holds; nothing is built."""
    if shape.vocab_size != made_for.get("vocab_size"):
        raise InputError(
            f"the drafter's config does not fit itself: its vocab_size is {shape.vocab_size}, "
            f"that of its target {made_for.get('vocab_size')}"
        )
    tensors = read_header(weights)
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    scales = [one.shape for name, one in tensors.items() if name.endswith(".scales")]
    widest = max([widest, *(one[-1] * group_size for one in scales if one)])
    sizes = {k: v for k, v in vars(shape).items() if k not in free and type(v) is int}
    for name, value in sizes.items():
        most = len(tensors) if name in ("num_draft_layers", "num_heads") else widest
        if value > most:
            raise InputError(
                f"{weights} does not fit its config: {name} is {value}, which no array there has"
            )


def _fit_vocabulary(network: Network, num_tokens: int, weights: Path) -> None:
    """Let a drafter draft tokens of the target only; they are used as indices.

    Raises:
        InputError: If its map names others.
    """
    token_ids = network.get("token_ids")
    if token_ids is not None:
        _check_token_ids(token_ids, num_tokens, weights)
    elif network.config.vocab_size > num_tokens:  # the target that it was made for was padded
        for head in network.heads:
            head.weight = head.weight[:num_tokens]
    vocab_size = min(network.config.vocab_size, num_tokens)
    change_shape(network, vocab_size=vocab_size)


def _check_token_ids(token_ids: mx.array, num_tokens: int, weights: Path) -> None:
    if not mx.issubdtype(token_ids.dtype, mx.integer):
        raise InputError(f"{weights}: token_ids must be whole numbers, got {token_ids.dtype}")
    tokens = sorted(to_host(token_ids))
    if tokens[0] < 0 or tokens[-1] >= num_tokens:
        raise InputError(
            f"{weights}: token_ids must lie in the vocabulary of {num_tokens}, "
            f"got {tokens[0]} to {tokens[-1]}"
        )
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{weights}: token_ids must not name a token twice")


def _check_numbers(network: Network, weights: Path) -> None:
    """Raise InputError if a weight is no finite number: nothing useful would be drafted."""
    arrays: dict[str, mx.array] = dict(tree_flatten(network.trainable_parameters()))
    for name, array in arrays.items():
        if not all_finite(array):
            raise InputError(f"{weights}: {name} holds values that are no finite numbers")
