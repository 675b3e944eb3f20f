"""Kinds of drafters by name.

A drafter's folder holds ``config.json``, ``model.safetensors`` and a model card. Its configuration
names its kind and carries a fingerprint of the target it was trained for, so that it never runs on
another one.
"""

from collections.abc import Callable
from pathlib import Path

from mlx import nn

from mlx_distill.checkpoint import bundled_folders, local_folder
from mlx_distill.drafters import medusa_folder, recurrent_folder
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.fingerprint import Fingerprint, check_fingerprint, fingerprint
from mlx_distill.drafters.medusa import MedusaConfig
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.mixture import MixedDrafter
from mlx_distill.drafters.ngram import PAIR, NGramDrafter
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.drafters.shortlist import FILE as SHORTLIST
from mlx_distill.errors import InputError
from mlx_distill.files import read_json, usable_path
from mlx_distill.safetensors import refuse_pickled
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields, Tokenizer

# By the model_type of config.json: takes the folder, the fields of its own, the target and the
# fingerprint; returns the drafter.
LOADERS: dict[str, Callable[[Path, Fields, Target, Fingerprint], Drafter]] = {
    RecurrentDrafterConfig.model_type: recurrent_folder.load,
    MedusaConfig.model_type: medusa_folder.load,
}
# The kinds with weights of their own that can be learned.
TrainedDrafter = BoundDrafter | MedusaDrafter
# The kind that needs no folder; before another drafter's name and a plus, both draft.
NGRAM = "ngram"
# The bundled drafter that fits, n-grams, both or neither: whichever is fastest.
AUTO = "auto"


def load_drafter(
    path_or_repo: str | Path, model: nn.Module, tokenizer: Tokenizer = None
) -> Drafter:
    """Return the drafter of a folder or a hub repository, ready to draft for a model.

    Args:
        path_or_repo: A folder, or a name on the hub; "ngram" for what followed the last tokens in
            the text, which needs no folder; "ngram+" and a folder for both in one tree; "auto"
            for whichever of a bundled drafter, n-grams, both and neither is fastest, which the
            first texts tell; "auto+" and a folder for the same with that drafter. N-grams by name
            store no texts, ``NGramDrafter`` does.
        model: The target; the drafter uses its embedding.
        tokenizer: The target's; with it the drafter's tokenizer hash is checked too.

    Raises:
        InputError: If the drafter is not there, is damaged, or was made for another target.
    """
    target, name = Target.of(model), str(path_or_repo)
    if name == NGRAM:
        target.require_drafting()
        return NGramDrafter(store_tokens=0)
    if name == AUTO or name.startswith(f"{AUTO}+"):
        return _auto_drafter(name.removeprefix(AUTO)[1:], model, tokenizer)
    if name.startswith(f"{NGRAM}+"):
        other = name.removeprefix(f"{NGRAM}+")
        usable_path(other, "the drafter beside n-grams")
        return with_ngrams(load_drafter(other, model, tokenizer))
    path = local_folder(path_or_repo, also=(SHORTLIST,))
    config = _read_config(path)
    kind = config.pop("model_type", None)
    if not isinstance(kind, str) or kind not in LOADERS:
        raise InputError(
            f"{path} holds a {kind}, not a {' or a '.join(LOADERS)}; what others published is read "
            "by convert --to ours"
        )
    made_for = config.pop("target", None)
    if not isinstance(made_for, dict):
        raise InputError(f"{path}: the drafter's config lacks the field target")
    target.require_drafting()
    check_fingerprint(made_for, fingerprint(target, tokenizer))
    return LOADERS[kind](path, config, target, made_for)


def with_ngrams(drafter: Drafter) -> MixedDrafter:
    """Return a drafter whose nodes are merged with those of n-grams; no text is stored."""
    return MixedDrafter(drafter, NGramDrafter(shortest=PAIR, store_tokens=0))


def _auto_drafter(name: str, model: nn.Module, tokenizer: Tokenizer) -> AutoDrafter:
    """Return what drafts in the way that is fastest, with a drafter or the bundled one that fits.

    Raises:
        InputError: If the drafter cannot be used.
    """
    if name.partition("+")[0] == AUTO:
        raise InputError(f"{AUTO}+{name} names no drafter; one stands behind {AUTO}+")
    if name:
        return AutoDrafter(load_drafter(name, model, tokenizer), Path(name).name)
    found = bundled_drafter(model, tokenizer)
    return AutoDrafter(None) if found is None else AutoDrafter(found[1], found[0].name)


def bundled_drafter(model: nn.Module, tokenizer: Tokenizer) -> tuple[Path, Drafter] | None:
    """Return the bundled drafter that fits a model, behind its folder; None if there is none.

    Args:
        model: The target.
        tokenizer: The target's; a drafter fits if it was made for the same tokens, width and number
            of layers: a student of the target has its tokens and its width, too.
    """
    target = Target.of(model)
    if target.support == "none":
        return None
    for path in bundled_folders():
        config = _read_config(path)
        if config.get("model_type") not in LOADERS:
            continue
        try:
            if config["target"]["num_layers"] != len(numbered_layers(model)):
                continue
            return path, load_drafter(path, model, tokenizer)
        except InputError:
            continue
    return None


def _read_config(path: Path) -> Fields:
    if not (path / "config.json").exists():
        refuse_pickled(path)
        raise InputError(f"{path} holds no config.json, so it is not a drafter's folder")
    return read_json(path / "config.json")
