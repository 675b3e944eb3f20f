"""Models and drafters, in and out of folders.

A drafter's folder holds ``config.json``, ``model.safetensors`` and a model card. Its configuration
carries a fingerprint of the target it was trained for, so that it never runs on another one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_distill.arrays import to_host
from mlx_distill.drafters.recurrent import (
    FORMAT_VERSION,
    MODEL_TYPE,
    BoundDrafter,
    RecurrentDrafter,
    RecurrentDrafterConfig,
)
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import check_safetensors, read_json
from mlx_distill.target.target import Target

# One of these holds the tokens; without any, the loader makes an empty tokenizer of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*", "*tokenizer*.py")

PACKAGE = Path(__file__).parent


def bundled(name: str) -> Path:
    """Return the folder of a model that comes with the package.

    Raises:
        InputError: If the package was installed without it.
    """
    for models in (PACKAGE / "models", PACKAGE.parent / "models"):
        if (models / name / "config.json").exists():
            return models / name
    raise InputError(f"the bundled model {name} is missing; install the package again")


def load(path_or_repo: str | Path, **options: Any) -> tuple[nn.Module, Any]:
    """Return the model and the tokenizer of a folder or a hub repository, as ``mlx_lm.load`` does.

    Without a GPU, floating-point weights are loaded as float32: half precision is emulated there.

    Args:
        path_or_repo: A folder, or a name on the hub.
        options: Further arguments of ``mlx_lm.load``.

    Raises:
        InputError: If the model is not there, is incomplete or damaged, or is of an unknown kind.
    """
    path = local_folder(path_or_repo)
    _check_model(path)
    try:
        model, tokenizer = mlx_lm.load(str(path), **options)[:2]
    except Exception as error:  # the model's own code meets a configuration that it did not expect
        raise InputError(f"{path} cannot be loaded: {one_line(error)}") from error
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    return model, tokenizer


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
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    fields = {k: v for k, v in vars(network.config).items() if v is not None}
    config = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **fields}
    files = {"config.json": json.dumps({**config, "target": target}, indent=2) + "\n", **files}
    half = tree_map(
        lambda x: x.astype(mx.float16) if mx.issubdtype(x.dtype, mx.floating) else x,
        network.parameters(),
    )
    weights: dict[str, Any] = dict(tree_flatten(half))
    try:
        writing.mkdir(parents=True)
        for name, text in files.items():
            (writing / name).write_text(text, encoding="utf-8")
        mx.save_safetensors(str(writing / "model.safetensors"), weights, {"format": "mlx"})
        check_safetensors(writing / "model.safetensors")
        os.replace(writing, folder)
    except (OSError, RuntimeError, InputError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise InputError(f"{folder} could not be written: {one_line(error)}") from None


def fingerprint(target: Target, tokenizer: Any = None) -> dict[str, Any]:
    """Return what a drafter has to know its target by."""
    known: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if tokenizer is not None:
        known["tokenizer_hash"] = tokenizer_hash(tokenizer)
    return known


def weights_hash(model: nn.Module) -> str:
    """Return a hash of some of every array of a model, which tells a fine-tuned one from its base.

    It reads the first values of each array only, so an edit of a few rows can go unnoticed.
    """
    digest = hashlib.sha256()
    arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
    for name, array in arrays.items():
        some = array.reshape(-1)[:256].view(mx.uint8)
        digest.update(name.encode() + bytes(to_host(some)))
    return digest.hexdigest()[:16]


def check_fingerprint(made_for: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise InputError if a drafter's target differs from the one it meets."""
    for name, value in found.items():
        if made_for.get(name) != value:
            raise InputError(
                f"the drafter was made for another target: its {name.replace('_', ' ')} is "
                f"{made_for.get(name)}, this model's is {value}"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their ids; it is computed once."""
    if tokenizer not in _hashes:
        tokens = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        _hashes[tokenizer] = hashlib.sha256(tokens).hexdigest()[:16]
    return _hashes[tokenizer]


_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def local_folder(path_or_repo: str | Path) -> Path:
    """Return the folder of a model, fetched from the hub if the name is not a folder here."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise InputError(f"{name} is a file; a model is a folder with config.json and weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"there is no folder {name}, and it is no name of a hub repository")
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        return Path(snapshot_download(name, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except Exception as error:  # the hub's client raises its transport's errors too
        raise InputError(
            f"there is no folder {name}, and it could not be fetched from the hub: "
            f"{one_line(error)}"
        ) from None


def _check_model(path: Path) -> None:
    """Raise InputError if a model's folder is incomplete, before anything is loaded from it."""
    config = _read_config(path)
    if "model_type" not in config:
        raise InputError(f"{path / 'config.json'} lacks the field model_type")
    if config["model_type"] == MODEL_TYPE:
        raise InputError(f"{path} holds a drafter, not a language model; use it with --drafter")
    index = path / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, dict) else []
    else:
        names = sorted(file.name for file in path.glob("model*.safetensors"))
    if not names:
        raise InputError(f"{path} holds no weights (model*.safetensors)")
    for name in names:
        check_safetensors(path / name)
    if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise InputError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise InputError(f"{path} holds no config.json, so it is not a model's folder")
    return read_json(path / "config.json")
