"""Recurrent drafters, in and out of folders."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.arrays import to_host, to_number
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.packing import unpacked
from mlx_distill.drafters.recurrent import (
    FORMAT_VERSION,
    MODEL_TYPE,
    RecurrentDrafter,
    RecurrentDrafterConfig,
)
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import whole_folder, write_whole
from mlx_distill.model_folder import check_quantization
from mlx_distill.safetensors import read_arrays, read_header
from mlx_distill.target.target import Target


def load(path: Path, fields: dict[str, Any], target: Target, made_for: Fingerprint) -> BoundDrafter:
    """Return the drafter of a folder, bound to a target.

    Args:
        path: The folder.
        fields: Its configuration, without its kind and its target.
        target: What it is going to draft for.
        made_for: Fingerprint of the target that it was trained for.

    Raises:
        InputError: If the configuration, the weights or the vocabulary do not fit.
    """
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, expected {FORMAT_VERSION}")
    quantization = fields.pop("quantization", None)
    check_quantization(quantization, path / "config.json")
    config = RecurrentDrafterConfig.from_dict(fields)
    weights = path / "model.safetensors"
    _check_sizes(config, weights, made_for, (quantization or {}).get("group_size", 1))
    network = RecurrentDrafter(config)
    try:
        arrays = read_arrays(weights)
        arrays = unpacked(arrays, quantization) if quantization else arrays
        network.load_weights(list(arrays.items()))
        mx.eval(network.parameters())
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{weights} does not fit its config: {one_line(error)}") from None
    assert target.embed is not None
    _fit_vocabulary(network, min(target.vocab_size, target.embed["weight"].shape[0]), weights)
    network.set_dtype(target.embed(mx.array([0])).dtype)
    network.eval()
    mx.eval(network.parameters())
    _check_numbers(network, weights)
    return BoundDrafter(network, target.embed, made_for)


def save_drafter(
    folder: Path, network: RecurrentDrafter, target: Fingerprint, files: dict[str, str]
) -> None:
    """Write a drafter's folder; it appears complete or not at all.

    Args:
        folder: Must not exist.
        network: The drafter; written in its type, in which it was judged.
        target: The fingerprint of its target.
        files: Further text files by name, the model card among them.

    Raises:
        InputError: If it cannot be written; nothing is left behind.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    with whole_folder(folder) as writing:
        config = configuration(network, target)
        write_whole(writing / "config.json", json.dumps(config, indent=2))
        for name, text in files.items():
            write_whole(writing / name, text)
        mx.save_safetensors(str(writing / "model.safetensors"), weights, {"format": "mlx"})


def configuration(network: RecurrentDrafter, target: Fingerprint) -> dict[str, Any]:
    """Return what ``config.json`` says of a drafter and its target."""
    fields = {k: v for k, v in vars(network.config).items() if v is not None}
    kind = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION}
    return {**kind, **fields, "target": target}


def _check_sizes(
    config: RecurrentDrafterConfig, weights: Path, made_for: Fingerprint, group_size: int
) -> None:
    """Raise InputError if a configuration asks for more than its file holds; nothing is built."""
    if config.vocab_size != made_for.get("vocab_size"):
        raise InputError(
            f"the drafter's config does not fit itself: its vocab_size is {config.vocab_size}, "
            f"that of its target {made_for.get('vocab_size')}"
        )
    tensors = read_header(weights)
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    scales = [one.shape for name, one in tensors.items() if name.endswith(".scales")]
    widest = max([widest, *(shape[-1] * group_size for shape in scales if shape)])
    others = ("vocab_size", "context_window")
    sizes = {k: v for k, v in vars(config).items() if k not in others and type(v) is int}
    for name, value in sizes.items():
        most = len(tensors) if name == "num_draft_layers" else widest
        if value > most:
            raise InputError(
                f"{weights} does not fit its config: {name} is {value}, which no array there has"
            )


def _fit_vocabulary(network: RecurrentDrafter, num_tokens: int, weights: Path) -> None:
    """Let a drafter draft tokens of the target only; they are used as indices.

    Raises:
        InputError: If its map names others.
    """
    token_ids = network.get("token_ids")
    if token_ids is not None:
        _check_token_ids(token_ids, num_tokens, weights)
    elif network.config.vocab_size > num_tokens:  # the target that it was made for was padded
        head = network.lm_head[-1]
        head.weight = head.weight[:num_tokens]
    vocab_size = min(network.config.vocab_size, num_tokens)
    network.config = dataclasses.replace(network.config, vocab_size=vocab_size)


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


def _check_numbers(network: RecurrentDrafter, weights: Path) -> None:
    """Raise InputError if a weight is no finite number: nothing useful would be drafted."""
    arrays: dict[str, mx.array] = dict(tree_flatten(network.trainable_parameters()))
    for name, array in arrays.items():
        if not to_number(mx.isfinite(array).all()):
            raise InputError(f"{weights}: {name} holds values that are no finite numbers")
