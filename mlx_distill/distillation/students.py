"""Students: from a configuration, from some of the teacher's layers, or from a checkpoint.

A student is exported as a folder that ``mlx_lm.generate`` loads: adapters are merged, projections
are left behind, weights may be quantised.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_distill.compat import model_classes
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import check_safetensors

LAYER_COUNTS = (
    *("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "num_transformer_layers",
)
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class AdapterConfig:
    """Which of the student's parameters are trained.

    Args:
        fine_tune: "full" trains all of them, "lora" and "dora" train adapters of low rank.
        lora_rank: Rank of the adapters.
        lora_scale: What the adapters' output is multiplied by.
        lora_layers: Layers with adapters, counted from the last; -1 is all.
    """

    fine_tune: str = "full"
    lora_rank: int = 8
    lora_scale: float = 20.0
    lora_layers: int = -1

    def __post_init__(self) -> None:
        if self.fine_tune not in ("full", "lora", "dora"):
            raise InputError(f"fine_tune must be full, lora or dora, got {self.fine_tune}")
        if self.lora_rank < 1:
            raise InputError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.lora_layers == 0 or self.lora_layers < -1:
            raise InputError(f"lora_layers must be -1 or at least 1, got {self.lora_layers}")

    def apply(self, student: nn.Module, seed: int = 0) -> None:
        """Freeze what is not trained, and put adapters, drawn anew, where they are wanted.

        Raises:
            InputError: If all of a quantised student is to be trained, or there are too few layers.
        """
        if self.fine_tune == "full":
            if any("scales" in module for module in student.modules()):
                raise InputError(
                    "the weights of a quantised student cannot be trained; train adapters with "
                    "--fine-tune lora, or take a student that is not quantised"
                )
            return
        mx.random.seed(seed)
        student.freeze()
        num_layers = len(student.layers)  # pyright: ignore
        count = num_layers if self.lora_layers == -1 else self.lora_layers
        if count > num_layers:
            raise InputError(f"lora_layers is {count}, the student has {num_layers}")
        shape = {"rank": self.lora_rank, "scale": self.lora_scale, "dropout": 0.0}
        linear_to_lora_layers(student, count, shape, use_dora=self.fine_tune == "dora")


def from_config(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Return a model with random weights.

    Raises:
        InputError: If mlx-lm does not know the kind, or a field is missing or wrong.
    """
    mx.random.seed(seed)
    try:
        model_class, arguments = model_classes(config)
        model = model_class(arguments.from_dict(config))
        mx.eval(model.parameters())
    except Exception as error:  # the model's own code meets a configuration it did not expect
        raise InputError(f"the student's config cannot be used: {one_line(error)}") from None
    return model


def from_layers(
    teacher: nn.Module, config: dict[str, Any], layers: Sequence[int]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of some of the teacher's layers, with their weights, and its configuration.

    Args:
        teacher: Not quantised.
        config: The teacher's.
        layers: Their numbers, in order.

    Raises:
        InputError: If a layer does not exist or is named twice, or the model cannot be cut so.
    """
    name = next((name for name in LAYER_COUNTS if name in config), None)
    if name is None:
        known = ", ".join(LAYER_COUNTS)
        raise InputError(f"the teacher's config says no number of layers ({known})")
    count = config[name]
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(
                f"there is no layer {layer}: the teacher has {count}, 0 to {count - 1}"
            )
    if not layers or sorted(set(layers)) != list(layers):
        raise InputError(f"the teacher's layers must be named once, in order, got {list(layers)}")
    if "quantization" in config:
        raise InputError("a student cannot be made of a quantised teacher's layers")
    own = copy.deepcopy(config) | {name: len(layers)}
    for key, value in config.items():  # one entry per layer: its kind, its window
        per_layer = isinstance(value, list) and len(value) == count
        if (
            per_layer and "token" not in key
        ):  # several end tokens may be as many as there are layers
            own[key] = [value[layer] for layer in layers]
    student = from_config(own)
    weights: dict[str, Any] = dict(tree_flatten(teacher.parameters()))
    chosen = {
        re.sub(
            r"\blayers\.(\d+)\.", lambda m: f"layers.{layers.index(int(m[1]))}.", key, count=1
        ): x
        for key, x in weights.items()
        if (found := re.search(r"\blayers\.(\d+)\.", key)) is None or int(found[1]) in layers
    }
    try:
        student.load_weights(list(chosen.items()))
    except ValueError as error:
        raise InputError(f"the teacher's layers do not fit: {one_line(error)}") from None
    # A copy: what the student learns must not reach the teacher.
    student.update(tree_map(mx.array, student.parameters()))
    mx.eval(student.parameters())
    return student, own


def merge_adapters(student: nn.Module) -> None:
    """Add what adapters have learned to the weights below them."""
    merged = [(n, m.fuse()) for n, m in student.named_modules() if hasattr(m, "fuse")]
    if merged:
        student.update_modules(tree_unflatten(merged))


def compact(
    student: nn.Module, config: dict[str, Any], dtype: str = "float16", bits: int | None = None
) -> dict[str, Any]:
    """Make a student in place what is exported; return the configuration that goes with it.

    Args:
        student: Adapters are merged, and weights change their type.
        config: The model's.
        dtype: Of the weights.
        bits: Quantise to so many.

    Raises:
        InputError: If it cannot be quantised.
    """
    merge_adapters(student)
    student.set_dtype(DTYPES[dtype])
    own = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")} | {"dtype": dtype}
    if bits is None:
        return own
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm tells how many bits it came to
            return quantize_model(student, own, None, bits)[1]
    except ValueError as error:
        raise InputError(f"the student cannot be quantised: {one_line(error)}") from None


def export(
    folder: Path,
    student: nn.Module,
    config: dict[str, Any],
    tokenizer: Any,
    files: Mapping[str, str | bytes],
) -> None:
    """Write a student as an mlx-lm model's folder; it appears complete or not at all.

    Args:
        folder: Must not exist.
        student: The model, as ``compact`` made it.
        config: What ``compact`` returned.
        tokenizer: Goes with it.
        files: Further files by name, the model card among them.

    Raises:
        InputError: If it cannot be written; nothing is left behind.
    """
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        save_model(writing, student)
        save_config(config, writing / "config.json")
        tokenizer.save_pretrained(str(writing))
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (writing / name).write_bytes(data)
        for weights in writing.glob("*.safetensors"):
            check_safetensors(weights)
        os.replace(writing, folder)
    except (OSError, RuntimeError, ValueError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise InputError(f"{folder} could not be written: {one_line(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's configuration: of a folder, or a file.

    Raises:
        InputError: If there is none.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"the config {path} lacks the field model_type")
    return config
