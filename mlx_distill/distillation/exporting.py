"""A student's folder, which ``mlx_lm.generate`` loads, as it is loaded, read and judged.

Adapters are merged or kept beside the model, weights take the type they are wanted in, and may be
quantised. What is measured is measured on the files: merging into quantised weights, or a narrower
type, makes another model of the one that was trained.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx.utils import tree_map, tree_map_with_path
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from mlx_distill.arrays import all_finite
from mlx_distill.checkpoint import local_folder
from mlx_distill.distillation.adapters import (
    AdapterConfig,
    drop_adapters,
    has_adapters,
    merge_adapters,
)
from mlx_distill.distillation.students import read_config
from mlx_distill.errors import InputError, not_numbers, one_line
from mlx_distill.files import output_path, whole_folder, write_whole
from mlx_distill.limits import OneOf, check_fields
from mlx_distill.model_folder import weight_files
from mlx_distill.safetensors import check_safetensors, read_header
from mlx_distill.target.reading import read_whole

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
STORED = {"F16": "float16", "BF16": "bfloat16"}  # others are written as float32
BITS = (2, 3, 4, 5, 6, 8)
ADAPTERS = "adapters"
# What belongs to a model beside its weights, its configuration and its tokenizer.
COPIED = ("generation_config.json", "chat_template*", "additional_chat_templates", "*.py")
Files = Mapping[str, str | bytes]


@dataclass(frozen=True)
class ExportConfig:
    """How the student is written.

    Args:
        export_dtype: Of the exported weights (default: that of the student's own files, or of the
            teacher's).
        export_bits: Quantise the exported student to so many bits. Without it, it is not.
        export_dequantized: Write the weights of a quantised student as floating-point numbers;
            merging adapters then loses nothing.
        keep_adapters: Write the adapters beside the model, in the folder adapters, instead of
            merging them.
    """

    export_dtype: Annotated[str | None, OneOf(*DTYPES)] = None
    export_bits: Annotated[int | None, OneOf(*BITS)] = None
    export_dequantized: bool = False
    keep_adapters: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.export_bits and self.export_dequantized:
            raise InputError("export_bits and export_dequantized exclude each other")

    def check(self, student: nn.Module) -> None:
        """Raise InputError if a student cannot be written so; to be asked before it learns."""
        if self.export_bits and any("scales" in module for module in student.modules()):
            raise InputError("the student is quantised already; leave export_bits away")


def stored_type(folder: Path) -> str:
    """Return the type of a model's weights in its files: of most of the values."""
    counts: dict[str, int] = {}
    for file in weight_files(folder):
        for tensor in read_header(file).values():
            if tensor.dtype in ("F16", "BF16", "F32"):
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.size
    return STORED.get(max(counts, key=lambda name: counts[name], default=""), "float32")


def compact(
    student: nn.Module, config: Mapping[str, Any], how: ExportConfig, stored: str | None = None
) -> dict[str, Any]:
    """Make a student in place what is exported; return the configuration that goes with it.

    Args:
        student: Adapters are merged unless they are kept, and weights change their type.
        config: The model's.
        how: What is wanted.
        stored: The type of the weights that the student began with; None takes the configuration's.

    Raises:
        InputError: If it cannot be quantised.
    """
    own = dict(config)
    said = own.pop("torch_dtype", None) or own.pop("dtype", None)
    own.pop("dtype", None)
    dtype = how.export_dtype or stored or (said if str(said) in DTYPES else "float32")
    if not how.keep_adapters:
        merge_adapters(student, how.export_dequantized)
    if how.export_dequantized:
        dequantize_model(student)
        own = {k: v for k, v in own.items() if not k.startswith("quantization")}
    _cast(student, DTYPES[dtype])
    own["dtype"] = dtype
    if how.export_bits is None:
        return own
    how.check(student)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm tells how many bits it came to
            return quantize_model(student, own, None, how.export_bits)[1]
    except ValueError as error:
        raise InputError(f"the student cannot be quantised: {one_line(error)}") from None


def _cast(student: nn.Module, dtype: mx.Dtype) -> None:
    """Give weights a type in place, less those that mlx-lm's conversion leaves as they are.

    Such are a router's biases and a mixer's decays: rounded, they choose other experts or forget at
    another pace.
    """
    casts = getattr(student, "cast_predicate", lambda name: True)

    def cast(name: str, x: mx.array) -> mx.array:
        return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) and casts(name) else x

    student.update(tree_map_with_path(cast, student.parameters()))


def export(
    folder: Path,
    student: nn.Module,
    config: dict[str, Any],
    tokenizer: Any,
    files: Files | Callable[[Path], Files],
    *,
    source: Path | None = None,
    adapter: AdapterConfig | None = None,
) -> None:
    """Write a student as an mlx-lm model's folder; it appears complete or not at all.

    Args:
        folder: Must not exist.
        student: The model, as ``compact`` made it.
        config: What ``compact`` returned.
        tokenizer: Goes with it.
        files: Further files by name, the model card among them; or what makes them of the folder
            that is written, which has all else by then.
        source: The folder that the tokenizer is from; its end tokens, templates and code go along.
        adapter: What made the student's adapters; they are written apart.

    Raises:
        InputError: If it cannot be written, or its logits are no numbers in the type it is written
            in; nothing is left behind.
    """
    with whole_folder(folder) as writing:
        if adapter is not None and has_adapters(student):
            adapter.save(student, writing / ADAPTERS)
            drop_adapters(student)
        save_model(writing, student)
        save_config(config, writing / "config.json")
        tokenizer.save_pretrained(str(writing))
        _copy_others(source, writing, tokenizer)
        if "model_file" not in config:  # code of its own is not run a second time
            _check_logits(writing)
        for name, content in (files(writing) if callable(files) else files).items():
            data = content.encode() if isinstance(content, str) else content
            (writing / name).write_bytes(data)


def export_student(
    folder: str | Path,
    student: nn.Module,
    tokenizer: Any,
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    how: ExportConfig | None = None,
) -> None:
    """Write a student that was trained from Python as a folder that mlx-lm loads.

    Args:
        folder: Must not exist.
        student: Changes its type, and is merged with its adapters, as the files have it.
        tokenizer: Goes with it.
        source: What it began as, or whose layers it has: a folder, or a name on the hub. Its end
            tokens and templates go along, and its weights' type is kept unless ``how`` names one.
        config: The student's; None for the source's.
        how: Type and bits; None for the defaults.

    Raises:
        InputError: If it cannot be written; nothing is left behind.
    """
    how = how or ExportConfig()
    if how.keep_adapters:
        raise InputError("keep_adapters is of the command; export_student merges adapters")
    begun = local_folder(source)
    given = read_config(begun) if config is None else config
    own = compact(student, given, how, stored_type(begun))
    export(output_path(folder), student, own, tokenizer, {}, source=begun)


def adapters_of(folder: Path) -> Path | None:
    """Return where a student's folder keeps its adapters, None if it has none apart."""
    return folder / ADAPTERS if (folder / ADAPTERS).is_dir() else None


def _copy_others(source: Path | None, folder: Path, tokenizer: Any) -> None:
    """Copy what else belongs to the source's model, and write down every token that ends a text."""
    for pattern in COPIED if source else ():
        for path in sorted(source.glob(pattern) if source else ()):
            if (folder / path.name).exists():
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy(path, folder / path.name)
    known = getattr(tokenizer, "eos_token_ids", ())  # one number, of a tokenizer without mlx-lm's
    ends = sorted(known) if isinstance(known, set | list | tuple) else []
    settings = folder / "generation_config.json"
    if ends and not settings.exists() and ends != [tokenizer.eos_token_id]:
        write_whole(settings, json.dumps({"eos_token_id": ends}) + "\n")


def _check_logits(folder: Path) -> None:
    """Raise InputError if a written model's logits are no numbers, in the type it is written in."""
    for weights in weight_files(folder):
        check_safetensors(weights)
    model = mlx_lm.utils.load_model(folder, lazy=True)[0]
    types = _types(model)
    if not _is_finite(model):
        raise not_numbers(f"in {types}, the type that it would be written in")


def _is_finite(model: nn.Module) -> bool:
    """Return whether a model's logits are numbers."""
    tokens = mx.arange(1, 9)[None]
    try:
        return all_finite(read_whole(model, tokens))
    except RuntimeError:
        # Off a GPU MLX's products of experts are float32; what rounding made infinite stays so.
        model.set_dtype(mx.float32)
        return all_finite(read_whole(model, tokens))


def _types(model: nn.Module) -> str:
    found: set[str] = set()
    tree_map(lambda x: found.add(str(x.dtype).removeprefix("mlx.core.")), model.parameters())
    return " and ".join(sorted(name for name in found if "float" in name))
