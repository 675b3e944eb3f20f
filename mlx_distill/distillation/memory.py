"""What a distillation needs in memory, before anything is written."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import machine
from mlx_distill.arrays import num_bytes, num_values
from mlx_distill.errors import InputError
from mlx_distill.losses.chunked import chunk_rows
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.reading import fresh_caches, vocab_width
from mlx_distill.target.watching import Heard, listening_once

# Measured: arrays as large as a chunk's logits that are there at once, of one chunk and of several,
# as MLX makes room for some operations ahead; and arrays as large as attention's scores.
ONE_CHUNK, CHUNKS, SCORES = 5, 8.5, 1.2


def memory_estimate(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    batch_size: int,
    width: int,
    checkpointed: bool,
) -> str:
    """Return the memory that training takes, in words.

    A layer keeps what its modules are given and return, which a reading that computes nothing
    tells, and attention's scores; the backward holds as much again of one layer. An update needs
    the old and the new moments at once. Held-out texts are not counted.

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
    trained = student.trainable_parameters()
    floats = 4 * num_values(trained)
    arrays: list[tuple[str, Any]] = [*tree_flatten(trained)]  # pyright: ignore
    masters = sum(4 * x.size for _, x in arrays if x.dtype != mx.float32)
    layers = [batch_size * size for size in layer_bytes(student, width)]
    kept = max(layers, default=0) if checkpointed else sum(layers)
    activations = kept + max(layers, default=0) + _chunk_bytes(student, batch_size * width)
    # Gradients and moments; then, without activations, what an update makes of them.
    training = masters + max(3 * floats + activations, 5 * floats)
    total = teaching + weights + training
    text = (
        f"memory: about {total / 1e9:.2f} GB (teachers {teaching / 1e9:.2f}, student "
        f"{weights / 1e9:.2f}, gradients and optimizer {(masters + 3 * floats) / 1e9:.2f}, a batch "
        f"of {batch_size} x {width} tokens {activations / 1e9:.2f})"
    )
    if total > machine.memory_bytes():
        raise InputError(
            f"{text}, but this machine has {machine.memory_bytes() / 1e9:.1f} GB; use a smaller "
            "--batch-size with --accumulate, --grad-checkpoint, or adapters (--fine-tune lora)"
        )
    return text


def layer_bytes(network: nn.Module, width: int) -> list[int]:
    """Return what every layer keeps of one text for its backward; nothing is computed."""
    try:
        layers = numbered_layers(network)
    except InputError:  # a network of one piece
        return []
    seen: list[dict[int, mx.array]] = [{} for _ in layers]
    heard = [
        Heard(module, partial(_note, arrays))
        for layer, arrays in zip(layers, seen, strict=True)
        for module in layer.modules()
        if not module.children()
    ]
    with listening_once(heard):
        network(mx.zeros((1, width), mx.int32), cache=fresh_caches(network))
    return [
        sum(array.nbytes for array in arrays.values()) + _score_bytes(layer, width)
        for layer, arrays in zip(layers, seen, strict=True)
    ]


def _note(arrays: dict[int, mx.array], call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    output = call(*given, **named)
    arrays.update((id(one), one) for one in (*given, output) if isinstance(one, mx.array))
    return output


def _score_bytes(layer: nn.Module, width: int) -> int:
    heads = getattr(getattr(layer, "self_attn", None), "n_heads", 8)
    return int(SCORES * 4 * heads * width * width)


def _chunk_bytes(student: nn.Module, tokens: int) -> int:
    """Return what the vocabulary's loss takes beside the head's gradient."""
    entries = vocab_width(student)
    rows = chunk_rows(entries)
    return int((CHUNKS if tokens > rows else ONE_CHUNK) * 4 * min(tokens, rows) * entries)
