"""What a distillation needs in memory, before anything is written."""

from collections.abc import Sequence
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import machine
from mlx_distill.arrays import num_bytes, num_values
from mlx_distill.errors import InputError

CHUNK_BYTES = (
    100e6  # of logits, goals and gradients of a chunk of the loss, over large vocabularies
)


def memory_estimate(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    batch_size: int,
    width: int,
    checkpointed: bool,
) -> str:
    """Return the memory that training takes, in words.

    Weights, gradients and the optimizer's two moments are known. Of the activations a layer keeps
    what the student's own matrices make: the width of every output, attention's scores among them.

    Args:
        student: Its trainable parameters have gradients and moments.
        teachers: Live ones stay loaded.
        batch_size: Texts per batch.
        width: The longest text, in tokens.
        checkpointed: Whether activations are computed twice instead of being kept.

    Raises:
        InputError: If that is more than the machine has.
    """
    teaching = sum(num_bytes(teacher.parameters()) for teacher in teachers)
    weights = num_bytes(student.parameters())
    trained = 3 * 4 * num_values(student.trainable_parameters())
    tokens = batch_size * width
    layers = getattr(student, "layers", ())
    per_layer = [_outputs(layer, width) for layer in layers]
    kept = max(per_layer, default=0) if checkpointed else sum(per_layer)
    # The loss's chunk: logits, probabilities, goals and gradients.
    activations = 4 * tokens * kept + CHUNK_BYTES
    total = teaching + weights + trained + activations
    text = (
        f"memory: about {total / 1e9:.2f} GB (teachers {teaching / 1e9:.2f}, student "
        f"{weights / 1e9:.2f}, gradients and optimizer {trained / 1e9:.2f}, a batch of "
        f"{batch_size} x {width} tokens {activations / 1e9:.2f})"
    )
    if total > machine.memory_bytes():
        raise InputError(
            f"{text}, but this machine has {machine.memory_bytes() / 1e9:.1f} GB; use a smaller "
            "--batch-size with --accumulate, --grad-checkpoint, or adapters (--fine-tune lora)"
        )
    return text


def _outputs(layer: nn.Module, width: int) -> int:
    """Return how many values per token a layer keeps for its backward."""
    arrays: list[tuple[str, Any]] = [*tree_flatten(layer.parameters())]  # pyright: ignore
    matrices = [x.shape for _, x in arrays if x.ndim >= 2]
    heads = getattr(getattr(layer, "self_attn", None), "n_heads", 8)
    # Every matrix's output, as it is and behind norms, rotations and gates; scores and weights.
    return 3 * sum(shape[-2] for shape in matrices) + 2 * heads * width
