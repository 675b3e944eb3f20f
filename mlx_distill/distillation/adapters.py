"""Which of a student's parameters are trained: all of them, or adapters of low rank."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill.compat import complete
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import write_whole
from mlx_distill.limits import Between, OneOf, check_fields
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.reading import vocab_width


@dataclass(frozen=True)
class AdapterConfig:
    """Which of the student's parameters are trained.

    Args:
        fine_tune: "full" trains all of them, "lora" and "dora" train adapters of low rank.
        lora_rank: Rank of the adapters.
        lora_scale: What the adapters' output is multiplied by.
        lora_layers: Layers with adapters, counted from the last; -1 is all.
    """

    fine_tune: Annotated[str, OneOf("full", "lora", "dora")] = "full"
    lora_rank: Annotated[int, Between(1, 65_536)] = 8
    lora_scale: Annotated[float, Between(-1e6, 1e6)] = 20.0
    lora_layers: Annotated[int, Between(1, 10_000, also=-1)] = -1

    def __post_init__(self) -> None:
        check_fields(self)

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
        complete(student)
        student.freeze()
        try:
            linear_to_lora_layers(
                student, self._count(student), self._shape(), use_dora=self.fine_tune == "dora"
            )
            vocab_width(student)  # its code may look into a layer that is an adapter now
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"a {type(student).__name__} cannot have adapters ({self.fine_tune}): "
                f"{one_line(error)}"
            ) from None
        if not tree_flatten(student.trainable_parameters()):
            raise InputError(f"no layer of a {type(student).__name__} can have adapters")

    def save(self, student: nn.Module, folder: Path) -> None:
        """Write a student's adapters as mlx-lm's ``--adapter-path`` reads them.

        Args:
            student: As ``apply`` made it; what is trained is written.
            folder: Is made.
        """
        folder.mkdir(parents=True)
        arrays: dict[str, mx.array] = dict(tree_flatten(student.trainable_parameters()))  # pyright: ignore
        config = {
            "fine_tune_type": self.fine_tune,
            "num_layers": self._count(student),
            "lora_parameters": self._shape(),
        }
        mx.save_safetensors(str(folder / "adapters.safetensors"), arrays, {"format": "mlx"})
        write_whole(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")

    def _count(self, student: nn.Module) -> int:
        """Return how many layers have adapters."""
        num_layers = len(numbered_layers(student))
        if self.lora_layers > num_layers:
            raise InputError(f"lora_layers is {self.lora_layers}, the student has {num_layers}")
        return num_layers if self.lora_layers == -1 else self.lora_layers

    def _shape(self) -> dict[str, Any]:
        return {"rank": self.lora_rank, "scale": self.lora_scale, "dropout": 0.0}


def has_adapters(student: nn.Module) -> bool:
    """Return whether there is something to merge, or to keep apart."""
    return any(hasattr(module, "fuse") for module in student.modules())


def merge_adapters(student: nn.Module, dequantize: bool = False) -> None:
    """Add what adapters have learned to the weights below them, in place.

    Args:
        student: Weights that are quantised are so again afterwards, which costs some of it.
        dequantize: Leave them as floating-point numbers instead.
    """
    merged = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in student.named_modules()
        if hasattr(module, "fuse")
    ]
    if merged:
        student.update_modules(tree_unflatten(merged))


def drop_adapters(student: nn.Module) -> None:
    """Take a student's adapters away, in place; what they stood on is left."""
    below = [
        (name, getattr(module, "linear", None) or module.embedding)
        for name, module in student.named_modules()
        if hasattr(module, "fuse")
    ]
    if below:
        student.update_modules(tree_unflatten(below))
