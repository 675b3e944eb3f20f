"""What a model supports, remembered from the last time that it was opened.

To find it out takes a dozen calls of the model. A command does not repeat them for a model that it
has opened before: the same code, weights, versions and device would give the same answer. What
cannot be read, or kept, is found out again, and nothing is said of it.
"""

import hashlib
import inspect
import json
import os
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import base, cache

from mlx_distill import machine
from mlx_distill.errors import InputError
from mlx_distill.files import read_json, write_whole
from mlx_distill.hashes import weights_hash
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields
from mlx_distill.user_cache import cache_folder

# With these the same operations round otherwise.
ENVIRONMENT = ("MLX_ENABLE_TF32", "MLX_DISABLE_COMPILE")


def open_remembered(model: nn.Module) -> Target:
    """Return the target of a model; what was found out about it before is not tried again.

    Raises:
        InputError: If its logits are not numbers.
    """
    file = _file_of(model)
    known = None if file is None else _read(file)
    target = Target.of(model, known)
    if file is not None and target.support not in (known, "none"):
        _keep(file, target.support)
    return target


def _file_of(model: nn.Module) -> Path | None:
    """Return where a model's support is kept; None if its code or a home is not to be found."""
    known = _code(model)
    if known is None:
        return None
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    known |= {
        "versions": machine.versions(),
        "machine": machine.description(),
        "environment": [os.environ.get(name) for name in ENVIRONMENT],
        "weights": weights_hash(model),
        "arrays": [(name, array.shape, str(array.dtype)) for name, array in arrays.items()],
        "modules": [(name, _settings(module)) for name, module in model.named_modules()],
        "config": repr(getattr(model, "args", None)),
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder = cache_folder("opened")
    except OSError:
        return None
    return folder / f"{getattr(model, 'model_type', 'model')}-{digest}.json"


def _code(model: nn.Module) -> Fields | None:
    """Return hashes of the code that runs when a model is opened, by file."""
    try:
        files = {inspect.getfile(type(module)) for module in model.modules()}
        files |= {base.__file__, cache.__file__, *map(str, Path(__file__).parent.rglob("*.py"))}
        return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}
    except (OSError, TypeError):
        return None


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """Return a module's class and its numbers, texts and flags."""
    plain = (int, float, str, bool, type(None))
    settings = sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain))
    return [("class", type(module).__qualname__), *settings]


def _read(file: Path) -> str | None:
    try:
        return str(read_json(file).get("support")) if file.exists() else None
    except (InputError, OSError):
        return None


def _keep(file: Path, support: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"support": support}) + "\n")
    except OSError:
        return
