"""Models, in: from a folder or a hub repository, checked, with or without adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_adapters

from mlx_distill.compat import complete
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_json, usable_path
from mlx_distill.model_folder import check_model
from mlx_distill.safetensors import check_safetensors, refuse_pickled

PACKAGE = Path(__file__).parent
OWN_CODE = (
    "needs Python code of its own, which is run only with --trust-remote-code "
    "(trust_remote_code=True)"
)


def bundled(name: str) -> Path:
    """Return the folder of a model that comes with the package.

    Raises:
        InputError: If the package was installed without it.
    """
    for folder in bundled_folders():
        if folder.name == name:
            return folder
    raise InputError(f"the bundled model {name} is missing; install the package again")


def bundled_folders() -> list[Path]:
    """Return the folders of all models and drafters that come with the package."""
    places = (PACKAGE / "models", PACKAGE.parent / "models")
    return [file.parent for place in places for file in sorted(place.glob("*/config.json"))]


def load(
    path_or_repo: str | Path,
    *,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    lazy: bool = False,
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Return the model and the tokenizer of a folder or a hub repository, as ``mlx_lm.load`` does.

    Without a GPU, floating-point weights are loaded as float32: half precision is emulated there.

    Args:
        path_or_repo: A folder, or a name on the hub.
        adapter_path: A folder of adapters that mlx-lm trained; None for none.
        trust_remote_code: Whether the repository may run code of its own. Without, nobody is asked.
        tokenizer_config: What the tokenizer is made with, beside what its files say.
        model_config: What replaces fields of its config.json.
        lazy: Leave the weights on the disk until they are used.
        revision: Of a repository on the hub: a branch, a tag or a commit; None for the newest.

    Raises:
        InputError: If the model is not there, is incomplete or damaged, is larger than the machine,
            or of an unknown kind, or the adapters are not there or not its own.
    """
    path = local_folder(path_or_repo, revision)
    in_float32 = mx.default_device() == mx.Device(mx.cpu)
    config = check_model(path, in_float32)
    if "model_file" in config and not trust_remote_code:
        raise InputError(f"{path} {OWN_CODE}")
    adapters = None if adapter_path is None else _adapter_folder(adapter_path)
    for name, given in (("tokenizer_config", tokenizer_config), ("model_config", model_config)):
        if not isinstance(given, Mapping | None):
            raise InputError(f"{name} must hold names and values, got {given!r:.40}")
    tokenizer_config = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    try:
        model, tokenizer = mlx_lm.load(
            str(path),
            lazy=True,
            trust_remote_code=trust_remote_code,
            tokenizer_config=tokenizer_config,
            model_config=model_config,
        )[:2]
        complete(model)
        _check_arrays(model)
        if adapters is not None:
            _add_adapters(model, adapters)
        if in_float32:
            model.set_dtype(mx.float32)
        _check_call(model)
        if not lazy:
            mx.eval(model.parameters())
    except InputError:
        raise
    except Exception as error:  # the model's own code meets a configuration that it did not expect
        raise _no_model(path, error) from error
    return model, tokenizer


def load_tokenizer(path_or_repo: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder or a hub repository, without its model.

    Raises:
        InputError: If it is not there, is damaged, or needs code of its own.
    """
    path = local_folder(path_or_repo)
    try:
        return mlx_lm.utils.load_tokenizer(path, {"trust_remote_code": trust_remote_code})
    except Exception as error:  # whatever the tokenizer's own code meets
        raise _no_model(path, error, "the tokenizer ") from None


def local_folder(
    path_or_repo: str | Path, revision: str | None = None, also: tuple[str, ...] = ()
) -> Path:
    """Return the folder of a model, fetched from the hub if the name is not a folder here.

    Args:
        path_or_repo: A folder, or a name on the hub; the oldest names there have no owner.
        revision: Of what is fetched; None for the newest.
        also: Names of files that are fetched beside those that mlx-lm fetches of a model.

    Raises:
        InputError: If there is no such folder, and nothing of the name on the hub.
    """
    path = usable_path(path_or_repo, "the model")
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        refuse_pickled(path)
        raise InputError(f"{name} is a file; a model is a folder with config.json and weights")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"there is no folder {name}, and it is no name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        patterns = [*DEFAULT_ALLOW_PATTERNS, *also]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its transport's errors too
        raise InputError(
            f"there is no folder {name}, and it could not be fetched from the hub: "
            f"{one_line(error)}"
        ) from None


def _no_model(path: Path, error: Exception, what: str = "") -> InputError:
    """Return what a loader's error means for its user."""
    if "trust_remote_code" in str(error):
        return InputError(f"{what}{path} {OWN_CODE}")
    said = one_line(error)
    if not what and isinstance(error, KeyError):
        said = f"its config.json lacks {said}"
    elif not what and isinstance(error, TypeError | AttributeError | ZeroDivisionError):
        said = f"its config.json holds a value that no such model has ({said})"
    return InputError(f"{what}{path} cannot be loaded: {said}")


def _check_arrays(model: nn.Module) -> None:
    """Raise InputError if weights are no real numbers, or whole ones where they are not packed.

    Files may hold masks beside them, which are no part of the model.
    """
    for path, module in model.named_modules():
        packed = any("scale" in name for name in module) or hasattr(module, "bits")
        for name, array in module.items():
            if not isinstance(array, mx.array):
                continue
            kind = str(array.dtype).removeprefix("mlx.core.")
            if array.dtype in (mx.bool_, mx.complex64):
                raise InputError(f"{path}.{name} is {kind}; weights are real numbers")
            whole = not packed and not mx.issubdtype(array.dtype, mx.floating)
            if whole and name.endswith(("weight", "bias")):
                raise InputError(f"{path}.{name} is {kind}; weights that are not packed are floats")


def _check_call(model: nn.Module) -> None:
    """Let the model's code fail here, if its arrays do not go together; nothing is computed."""
    model(mx.array([[0, 0]]), cache=make_prompt_cache(model))


def _adapter_folder(name: str | Path) -> Path:
    """Return a folder of adapters.

    Raises:
        InputError: If it is not there, incomplete or damaged.
    """
    path = usable_path(name, "the folder of adapters")
    if not path.is_dir():
        raise InputError(f"there is no folder {name} with adapters")
    if not (path / "adapter_config.json").exists():
        raise InputError(f"{path} holds no adapter_config.json, so it holds no adapters of mlx-lm")
    read_json(path / "adapter_config.json")
    check_safetensors(path / "adapters.safetensors")
    return path


def _add_adapters(model: nn.Module, path: Path) -> None:
    """Put adapters over a model's layers, in place."""
    try:
        load_adapters(model, str(path))
        model.eval()
        _check_arrays(model)
    except InputError as error:
        raise InputError(f"the adapters of {path}: {error}") from None
    except Exception as error:  # a configuration of adapters may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the adapters of {path} do not fit the model: {reason}") from None
