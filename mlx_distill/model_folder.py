"""A model's folder, checked before anything is built from it.

What its files say is compared with each other and with this machine: a configuration may ask for a
million layers that the weights do not have. Nothing of the folder's own code is run.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_distill import machine
from mlx_distill.errors import InputError
from mlx_distill.files import read_json
from mlx_distill.safetensors import BITS, Tensor, read_header, refuse_pickled

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
# One of these holds the tokens; without any, the loader makes an empty tokenizer of its own.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.jsonl", "tekken.json", "*.model", "*.tiktoken", "*vocab*"),
    *("*tokenizer*.py", "*tokenization*.py"),
)
# What mlx-lm and the tokenizers' library read as JSON objects beside config.json.
GENERATION = "generation_config.json"
SETTINGS = (
    *(GENERATION, "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "hf_quant_config.json"),
)

# Names of numbers that count layers, and of those that are some array's width or a part of it.
LAYERS = re.compile(r"(num_|n_)(\w+_)?layers?")
WIDTHS = re.compile(r"(\w+_)?(size|dim|dims|heads?|rank|experts|embd|model|groups)")
NO_WIDTHS = re.compile(r"window|chunk|block|image|patch|kernel|batch|tile|seq|step|context|buffer")
# Other parts of a model than the one that reads text; mlx-lm leaves them out.
OTHER_PARTS = re.compile(r"vision|audio|speech|image|video|quant|talker|tts")
# Settings of the positions, and their numbers; no context is as long as the last of these.
ROPE = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
ROPE_MOST = 1e15
BITS_PACKED = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
# Kinds of files that a tokenizer or mlx-lm reads, by the ends of their names.
READ = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors", ".py"}
MOST_PACKED = 32  # values in one: no quantised array is narrower than this share of its width


def check_model(path: Path, in_float32: bool) -> dict[str, Any]:
    """Return the configuration of a model's folder.

    Args:
        path: The folder.
        in_float32: Whether its weights will be float32, whatever they are in their files.

    Raises:
        InputError: If the folder is incomplete, its files are damaged or do not fit each other, or
            the model is larger than the machine.
    """
    config = read_config(path)
    for file in sorted(path.iterdir()):  # their readers would wait for a pipe, for ever
        if file.suffix in READ and file.exists() and not file.is_file():
            raise InputError(f"{file} is no file but a folder, a pipe or a device")
    if config["model_type"].endswith("_drafter"):
        raise InputError(f"{path} holds a drafter, not a language model; use it with --drafter")
    tensors = _weights(path)
    _check_memory(path, tensors, in_float32)
    check_sizes(config, tensors, str(path / "config.json"))
    check_quantization(config.get("quantization"), path / "config.json")
    for name in SETTINGS:
        if (path / name).exists():
            values = _settings(path / name)
            _check_end_tokens(values.get("eos_token_id"), path / name)
    if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise InputError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    return config


def _settings(file: Path) -> dict[str, Any]:
    """Return what a file of settings holds; of what mlx-lm passes over, one line on stderr.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    if file.name == GENERATION:
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            said = f"{error.msg} at column {error.colno} of line {error.lineno}"
            print(f"mlx_distill: {file} is passed over: {said}", file=sys.stderr)
            return {}
        except (OSError, ValueError, RecursionError):
            pass  # mlx-lm cannot load it, and the sentence is the other files'
    return read_json(file)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a model's folder.

    Raises:
        InputError: If there is none, or it does not say what kind of model it is.
    """
    file = path / "config.json"
    if not file.exists():
        raise InputError(f"{path} holds no config.json, so it is not a model's folder")
    config = read_json(file)
    kind = config.get("model_type")
    if kind is None:
        raise InputError(f"{file} lacks the field model_type")
    if not isinstance(kind, str):
        raise InputError(f"{file}: model_type must be a text, got {kind}")
    _check_end_tokens(config.get("eos_token_id"), file)
    _check_rope(config, file)
    return config


def weight_files(path: Path) -> list[Path]:
    """Return the files of a model's weights, those that its index names among them.

    A folder that was converted may have kept the index of another build: if none of the files that
    it names is there, those that are there are the model, as mlx-lm has it.

    Raises:
        InputError: If there are none, or some of those that the index names are missing.
    """
    found = sorted(path.glob(WEIGHTS))
    if not found:
        refuse_pickled(path)
    named = _indexed(path / INDEX) if (path / INDEX).exists() else []
    missing = [name for name in named if not (path / name).exists()]
    if missing and (len(missing) < len(named) or not found):
        raise InputError(f"{path / missing[0]} is missing")
    if not found:
        raise InputError(f"{path} holds no weights ({WEIGHTS})")
    return found


def _indexed(index: Path) -> list[str]:
    """Return the names of the files that an index of shards has."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index} holds no weights: its weight_map is {places}")
    for tensor, name in places.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise InputError(f"{index}: the place of {tensor} must be a file's name, got {name!r}")
    return sorted(set(places.values()))


def _weights(path: Path) -> dict[str, Tensor]:
    """Return what arrays a model's folder holds, those that mlx-lm leaves out among them."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= read_header(file)
    return tensors


def _check_memory(path: Path, tensors: dict[str, Tensor], in_float32: bool) -> None:
    """Raise InputError if a model is larger than the machine."""

    def size(tensor: Tensor) -> float:
        bits = BITS[tensor.dtype]
        return tensor.size * (32 if in_float32 and tensor.dtype in ("F16", "BF16") else bits) / 8

    needed = sum(map(size, tensors.values()))
    if needed > machine.memory_bytes():
        raise InputError(
            f"{path} needs {needed / 1e9:.1f} GB for its weights, this machine has "
            f"{machine.memory_bytes() / 1e9:.1f}"
        )


def check_sizes(config: dict[str, Any], tensors: dict[str, Tensor], place: str) -> None:
    """Raise InputError if a configuration asks for more than a file's arrays can be.

    Args:
        config: The model's.
        tensors: What its files hold.
        place: The configuration's, for the error.
    """
    widest = max((max(t.shape, default=1) for t in tensors.values() if t.size), default=1)
    for name, value in whole_numbers(config):
        if LAYERS.fullmatch(name) and value > len(tensors):
            raise InputError(f"{place}: {name} is {value}, the weights hold {len(tensors)} arrays")
        if is_width(name) and value > MOST_PACKED * widest:
            raise InputError(
                f"{place}: {name} is {value}, the weights' widest array has {widest} values a row"
            )


def is_width(name: str) -> bool:
    """Return whether a number of a configuration is some array's width, or a part of it."""
    return bool(WIDTHS.fullmatch(name)) and not NO_WIDTHS.search(name)


def whole_numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration, and of its parts that read text."""
    for name, value in config.items():
        if type(value) is int:
            yield name, value
        elif isinstance(value, dict) and not OTHER_PARTS.search(name):
            yield from whole_numbers(value)


def _check_end_tokens(tokens: Any, place: Path) -> None:
    """Raise InputError if the tokens that end a text are no token ids."""
    for token in tokens if isinstance(tokens, list) else [tokens]:
        if token is not None and (type(token) is not int or not 0 <= token < 2**31):
            raise InputError(f"{place}: eos_token_id must be token ids, got {tokens}")


def _check_rope(config: dict[str, Any], place: Path, inside: bool = False) -> None:
    """Raise InputError if positions are scaled by what is no number above 0.

    mlx-lm takes a negative factor without a word; settings may be nested, by the layers' kinds.
    """
    for name, value in config.items():
        if name in ROPE and not isinstance(value, dict | None):
            raise InputError(f"{place}: {name} must be an object, got {value!r}")
        if isinstance(value, dict):
            _check_rope(value, place, inside or name in ROPE)
        fits = isinstance(value, int | float) and type(value) is not bool and 0 < value < ROPE_MOST
        if inside and name in ROPE_NUMBERS and value is not None and not fits:
            raise InputError(f"{place}: {name} must be a number above 0, got {value!r}")


def check_quantization(settings: Any, place: Path) -> None:
    """Raise InputError if weights are said to be packed as nothing is."""
    if settings is None:
        return
    sizes = [
        settings.get(x) if isinstance(settings, dict) else None for x in ("bits", "group_size")
    ]
    # 4.0 is equal to 4, and no number of bits for MLX.
    whole = all(type(size) is int for size in sizes)
    known = whole and sizes[0] in BITS_PACKED and sizes[1] in GROUPS
    if not known:
        raise InputError(
            f"{place}: a quantization has {', '.join(map(str, BITS_PACKED))} bits in groups of "
            f"{', '.join(map(str, GROUPS))}, got {settings}"
        )
