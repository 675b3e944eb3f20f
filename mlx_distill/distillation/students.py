"""Students: from a configuration, or from some of the teacher's layers."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_distill import machine
from mlx_distill.arrays import num_values
from mlx_distill.compat import complete, model_classes
from mlx_distill.distillation.adapters import has_adapters
from mlx_distill.distillation.layer_kinds import (
    NEEDS_OTHERS,
    different_kind,
    different_result,
    structures,
)
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_json
from mlx_distill.model_folder import LAYERS, is_width, whole_numbers
from mlx_distill.target.layers import layer_list

MOST_LAYERS = 10_000
WIDEST = 2**24  # of any array of a layer


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's configuration: of a folder, or a file.

    Raises:
        InputError: If there is none.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = read_json(path)
    except InputError as error:
        raise InputError(f"the config {error}") from None
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"the config {path} lacks the field model_type")
    return config


def from_config(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Return a model with random weights.

    Raises:
        InputError: If mlx-lm does not know the kind, a field is missing or wrong, or the machine
            has no room for it.
    """
    mx.random.seed(seed)
    _check_sizes(config)
    model = build(config)
    needed = 4 * num_values(model.parameters())
    if needed > machine.memory_bytes():
        raise InputError(
            f"the student's config asks for {needed / 4:,.0f} parameters, {needed / 1e9:.1f} GB; "
            f"this machine has {machine.memory_bytes() / 1e9:.1f} GB"
        )
    mx.eval(model.parameters())
    return model


def build(config: dict[str, Any]) -> nn.Module:
    """Return a model whose random weights are not drawn before they are used.

    Raises:
        InputError: If mlx-lm does not know the kind, or a field is missing or wrong.
    """
    try:
        model_class, arguments = model_classes(config)
        model = model_class(arguments.from_dict(config))
    except Exception as error:  # the model's own code meets a configuration it did not expect
        raise InputError(f"the student's config cannot be used: {one_line(error)}") from None
    complete(model)
    return model


def from_layers(
    teacher: nn.Module, config: dict[str, Any], layers: Sequence[int]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of some of the teacher's layers, with their weights, and its configuration.

    Every layer stays what it is in the teacher, a window or a mixture of experts, though an
    architecture may tell it by the layer's number.

    Args:
        teacher: Not quantised, and its adapters merged.
        config: The teacher's.
        layers: Their numbers, in order.

    Raises:
        InputError: If a layer does not exist or is named twice, or no configuration of the
            architecture has such layers.
    """
    place, theirs = layer_list(teacher)
    for layer in layers:
        if not 0 <= layer < len(theirs):
            raise InputError(
                f"there is no layer {layer}: the teacher has {len(theirs)}, 0 to {len(theirs) - 1}"
            )
    if not layers or sorted(set(layers)) != list(layers):
        raise InputError(f"the teacher's layers must be named once, in order, got {list(layers)}")
    if "quantization" in config or any("scales" in module for module in teacher.modules()):
        raise InputError("a student cannot be made of a quantised teacher's layers")
    if has_adapters(teacher):
        raise InputError("a student cannot be made of layers with adapters; merge them first")
    student, own = _of_the_same_kinds(teacher, config, layers)
    _take_weights(teacher, student, place, layers)
    other = different_result(teacher, student, layers)
    if other is not None:
        raise InputError(
            f"no student can be made of the teacher's layers {list(layers)}: what layer {other} "
            "does depends on how many there are"
        )
    return student, own


def _of_the_same_kinds(
    teacher: nn.Module, config: dict[str, Any], layers: Sequence[int]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a student whose layers are what the teacher's are, and its configuration."""
    first = None
    for own in structures(teacher, config, layers):
        try:
            student = build(copy.deepcopy(own))  # some write into what they are given
            reason = different_kind(teacher, student, layers)
        except InputError:  # the teacher's is one: an index of layers of some kind is empty
            reason = NEEDS_OTHERS
        else:
            if reason is None:
                return student, own
        first = first or reason
    raise InputError(f"no student can be made of the teacher's layers {list(layers)}: {first}")


def _take_weights(
    teacher: nn.Module, student: nn.Module, place: str, layers: Sequence[int]
) -> None:
    """Give a student the weights of the teacher's layers, and all that is not in a layer.

    They are copies: what the student learns must not reach the teacher.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(teacher.parameters()))  # pyright: ignore
    goal: dict[str, mx.array] = dict(tree_flatten(student.parameters()))  # pyright: ignore
    numbered = re.compile(re.escape(place) + r"\.(\d+)\.")
    chosen = []
    for name, array in goal.items():
        source = numbered.sub(lambda m: f"{place}.{layers[int(m[1])]}.", name, count=1)
        if source not in weights:
            raise InputError(f"the teacher's layers do not fit: it has no {source}")
        chosen.append((name, _fitted(source, weights[source], array, layers)))
    student.load_weights(chosen)
    student.update(tree_map(mx.array, student.parameters()))
    mx.eval(student.parameters())


def _fitted(name: str, theirs: mx.array, goal: mx.array, layers: Sequence[int]) -> mx.array:
    """Return an array as the student needs it; some hold an equal part for every layer."""
    axes = [i for i, (a, b) in enumerate(zip(theirs.shape, goal.shape, strict=True)) if a != b]
    if not axes:
        return theirs
    axis = axes[0]
    part, rest = divmod(goal.shape[axis], len(layers))
    if len(axes) > 1 or rest or theirs.shape[axis] % part:
        raise InputError(
            f"the teacher's layers do not fit: its {name} is {theirs.shape}, not {goal.shape}"
        )
    rows = [layer * part + i for layer in layers for i in range(part)]
    return mx.take(theirs, mx.array(rows), axis=axis)


def _check_sizes(config: dict[str, Any]) -> None:
    """Raise InputError if a configuration asks for more than any model has; it may be damaged."""
    for name, value in whole_numbers(config):
        most = MOST_LAYERS if LAYERS.fullmatch(name) else WIDEST if is_width(name) else None
        if most is not None and value > most:
            raise InputError(f"the student's config: {name} must be at most {most:,}, got {value}")
