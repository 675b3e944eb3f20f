"""Kinds of drafters by name, and which targets a drafter was made for.

A drafter's folder holds ``config.json``, ``model.safetensors`` and a model card. Its configuration
names its kind and carries a fingerprint of the target it was trained for, so that it never runs on
another one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx import nn

from mlx_distill.checkpoint import local_folder
from mlx_distill.drafters import recurrent, recurrent_folder
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.errors import InputError
from mlx_distill.files import read_json
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.target.target import Target

# By the model_type of config.json: takes the folder, the fields of its own, the target and the
# fingerprint; returns the drafter.
LOADERS: dict[str, Callable[[Path, dict[str, Any], Target, dict[str, Any]], Drafter]] = {
    recurrent.MODEL_TYPE: recurrent_folder.load,
}
# Those that need no folder.
WITHOUT_WEIGHTS: dict[str, Callable[[], Drafter]] = {"ngram": NGramDrafter}


def load_drafter(path_or_repo: str | Path, model: nn.Module, tokenizer: Any = None) -> Any:
    """Return the drafter of a folder or a hub repository, ready to draft for a model.

    Args:
        path_or_repo: A folder, a name on the hub, or the name of a kind that has no weights: ngram.
        model: The target; the drafter uses its embedding.
        tokenizer: The target's; with it the drafter's tokenizer hash is checked too.

    Raises:
        InputError: If the drafter is not there, is damaged, or was made for another target.
    """
    target = Target.of(model)
    if path_or_repo in WITHOUT_WEIGHTS:
        target.require_drafting()
        return WITHOUT_WEIGHTS[str(path_or_repo)]()
    path = local_folder(path_or_repo)
    config = _read_config(path)
    kind = config.pop("model_type", None)
    if not isinstance(kind, str) or kind not in LOADERS:
        raise InputError(f"{path} holds a {kind}, not a {' or a '.join(LOADERS)}")
    made_for = config.pop("target", None)
    if not isinstance(made_for, dict):
        raise InputError(f"{path}: the drafter's config lacks the field target")
    target.require_drafting()
    check_fingerprint(made_for, fingerprint(target, tokenizer))
    return LOADERS[kind](path, config, target, made_for)


def fingerprint(target: Target, tokenizer: Any = None) -> dict[str, Any]:
    """Return what a drafter has to know its target by."""
    known: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if tokenizer is not None:
        known["tokenizer_hash"] = tokenizer_hash(tokenizer)
    return known


def check_fingerprint(made_for: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise InputError if a drafter's target differs from the one it meets.

    Models of one tokenizer may have vocabularies of different widths, padded for the hardware's
    sake: a drafter fits all of them.
    """
    for name, value in found.items():
        known = made_for.get(name)
        padded = name == "vocab_size" and "tokenizer_hash" in found and similar(known, value)
        if known != value and not padded:
            raise InputError(
                f"the drafter was made for another target: its {name.replace('_', ' ')} is "
                f"{known}, this model's is {value}"
            )


def similar(known: Any, value: int) -> bool:
    """Return whether two vocabularies can be one with and without padding."""
    return type(known) is int and value <= 2 * known <= 4 * value


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise InputError(f"{path} holds no config.json, so it is not a drafter's folder")
    return read_json(path / "config.json")
