"""Drafters, in and out of folders.

A drafter's folder holds ``config.json``, ``model.safetensors`` and a model card. Its configuration
carries a fingerprint of the target it was trained for, so that it never runs on another one.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_distill.arrays import to_host
from mlx_distill.checkpoint import local_folder
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.recurrent import (
    FORMAT_VERSION,
    MODEL_TYPE,
    RecurrentDrafter,
    RecurrentDrafterConfig,
)
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import check_safetensors, read_json, whole_folder, write_whole
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.target.target import Target


def load_drafter(path_or_repo: str | Path, model: nn.Module, tokenizer: Any = None) -> BoundDrafter:
    """Return the drafter of a folder or a hub repository, ready to draft for a model.

    Args:
        path_or_repo: A folder, or a name on the hub.
        model: The target; the drafter uses its embedding.
        tokenizer: The target's; with it the drafter's tokenizer hash is checked too.

    Raises:
        InputError: If the drafter is not there, is damaged, or was made for another target.
    """
    path = local_folder(path_or_repo)
    config = _read_config(path)
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(f"{path} holds a {config.get('model_type')}, not a {MODEL_TYPE}")
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {config.get('format_version')}, expected {FORMAT_VERSION}"
        )
    target = Target.of(model)
    target.require_drafting()
    made_for = config.get("target")
    if not isinstance(made_for, dict):
        raise InputError(f"{path}: the drafter's config lacks the field target")
    check_fingerprint(made_for, fingerprint(target, tokenizer))
    known = {k: v for k, v in config.items() if k not in ("model_type", "format_version", "target")}
    network = RecurrentDrafter(RecurrentDrafterConfig.from_dict(known))
    weights = path / "model.safetensors"
    check_safetensors(weights)
    try:
        network.load_weights(str(weights))
        mx.eval(network.parameters())
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{weights} does not fit its config: {one_line(error)}") from None
    _check_token_ids(network, weights)
    assert target.embed is not None
    network.set_dtype(target.embed(mx.array([0])).dtype)
    network.eval()
    mx.eval(network.parameters())
    return BoundDrafter(network, target.embed, made_for)


def _check_token_ids(network: RecurrentDrafter, weights: Path) -> None:
    """Raise InputError if a drafter's tokens are not the target's; they are used as indices."""
    token_ids = network.get("token_ids")
    if token_ids is None:
        return
    if not mx.issubdtype(token_ids.dtype, mx.integer):
        raise InputError(f"{weights}: token_ids must be whole numbers, got {token_ids.dtype}")
    tokens = sorted(to_host(token_ids))
    if tokens[0] < 0 or tokens[-1] >= network.config.vocab_size:
        raise InputError(
            f"{weights}: token_ids must lie in the vocabulary of {network.config.vocab_size}, "
            f"got {tokens[0]} to {tokens[-1]}"
        )
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{weights}: token_ids must not name a token twice")


def save_drafter(
    folder: Path, network: RecurrentDrafter, target: dict[str, Any], files: dict[str, str]
) -> None:
    """Write a drafter's folder; it appears complete or not at all.

    Args:
        folder: Must not exist.
        network: The drafter; written as float16.
        target: The fingerprint of its target.
        files: Further text files by name, the model card among them.

    Raises:
        InputError: If it cannot be written; nothing is left behind.
    """
    fields = {k: v for k, v in vars(network.config).items() if v is not None}
    config = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **fields}
    half = tree_map(
        lambda x: x.astype(mx.float16) if mx.issubdtype(x.dtype, mx.floating) else x,
        network.parameters(),
    )
    weights: dict[str, Any] = dict(tree_flatten(half))
    with whole_folder(folder) as writing:
        write_whole(writing / "config.json", json.dumps({**config, "target": target}, indent=2))
        for name, text in files.items():
            write_whole(writing / name, text)
        mx.save_safetensors(str(writing / "model.safetensors"), weights, {"format": "mlx"})


def fingerprint(target: Target, tokenizer: Any = None) -> dict[str, Any]:
    """Return what a drafter has to know its target by."""
    known: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if tokenizer is not None:
        known["tokenizer_hash"] = tokenizer_hash(tokenizer)
    return known


def check_fingerprint(made_for: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise InputError if a drafter's target differs from the one it meets."""
    for name, value in found.items():
        if made_for.get(name) != value:
            raise InputError(
                f"the drafter was made for another target: its {name.replace('_', ' ')} is "
                f"{made_for.get(name)}, this model's is {value}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise InputError(f"{path} holds no config.json, so it is not a drafter's folder")
    return read_json(path / "config.json")
