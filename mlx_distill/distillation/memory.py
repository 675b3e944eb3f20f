"""What training and reading need in memory, before anything is written: the one memory model.

A command is as large as its largest phase. Factors that no shape tells were measured on a CPU,
where MLX makes room for some operations ahead; tests hold the estimates within 15 % of the peaks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import machine
from mlx_distill.arrays import num_bytes
from mlx_distill.distillation.judgement import judged_rows
from mlx_distill.errors import InputError
from mlx_distill.losses.chunked import chunk_rows
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.reading import fresh_caches, vocab_width
from mlx_distill.target.watching import Heard, listening_once
from mlx_distill.training.updates import LARGE

# Arrays as large as a chunk's logits that are there at once: in the loss and its gradient, of one
# chunk and of several; where texts are only judged; where the most probable are looked for; and
# where a model writes.
ONE_CHUNK, CHUNKS, JUDGED, RANKED, WRITTEN = 5, 8.5, 8, 12, 8.5
SCORES = 1.2  # arrays as large as attention's scores, in a layer
HEADS = 2  # gradients of the head, where their parts are joined
# An update makes some dozen arrays of each, ten at a time: so many times the ten largest. Those
# that wait for each other are there alone.
UPDATED, AHEAD = 2.5, 10
WRITING_STEP = 256  # tokens by which caches grow


@dataclass(frozen=True)
class Batch:
    """Texts that are in memory at once.

    Args:
        size: How many.
        width: The longest, in tokens.
    """

    size: int
    width: int

    def __str__(self) -> str:
        return f"{self.size} x {self.width} tokens"


@dataclass(frozen=True)
class Work:
    """What a distillation does with texts.

    Args:
        learned: A batch.
        judged: Held-out texts that are read at once; None if nothing is held out.
        written: What the student writes at once; None if it writes nothing.
        checkpointed: Whether activations are computed twice instead of being kept.
        accumulated: Whether gradients of several batches are added up.
    """

    learned: Batch
    judged: Batch | None = None
    written: Batch | None = None
    checkpointed: bool = False
    accumulated: bool = False


def memory_estimate(student: nn.Module, teachers: Sequence[nn.Module], work: Work) -> str:
    """Return the memory that a distillation takes, in words.

    A layer keeps what its modules are given and return, which a reading that computes nothing
    tells, and attention's scores. While activations are let go, gradients are made; then an update
    makes new arrays beside the old ones. Between steps only weights and moments are there.

    Args:
        student: Its trainable parameters have gradients and moments.
        teachers: Live ones stay loaded.
        work: What is read, learned and written at once.

    Raises:
        InputError: If that is more than the machine has.
    """
    trained = trained_arrays(student)
    floats = sum(4 * array.size for array in trained)
    masters = sum(4 * array.size for array in trained if array.dtype != mx.float32)
    loaded = {
        "teachers": sum(num_bytes(teacher.parameters()) for teacher in teachers),
        "student": num_bytes(student.parameters()),
    }
    optimizer = masters + 2 * floats
    largest = max((4 * array.size for array in trained), default=0)
    backward = _backward_bytes(student, work, largest) + work.accumulated * floats
    step = max(backward, floats + update_bytes(trained))
    phases: list[dict[str, int]] = [
        {"gradients and optimizer": optimizer + floats, f"a batch of {work.learned}": step - floats}
    ]
    if work.judged:
        judging = _judging_bytes(student, work.judged)
        phases.append({"optimizer": optimizer, f"held-out texts, {work.judged}": judging})
    if work.written:
        writing = _writing_bytes(student, work.written)
        phases.append({"optimizer": optimizer, f"writing {work.written}": writing})
    most = max(phases, key=lambda phase: sum(phase.values()))
    return in_words(
        loaded | most,
        "a smaller --batch-size with --accumulate, --grad-checkpoint, or adapters "
        "(--fine-tune lora)",
    )


def reading_estimate(models: Mapping[str, nn.Module], batch: Batch, logits_bytes: int) -> str:
    """Return the memory that models take which read texts, in words.

    Args:
        models: By name; all stay loaded.
        batch: Texts that are read at once, by one model after the other.
        logits_bytes: What is made of their hidden states then, with all that it takes.

    Raises:
        InputError: If that is more than the machine has.
    """
    parts = {name: num_bytes(model.parameters()) for name, model in models.items()}
    reading = max(_reading_bytes(model, batch) for model in models.values())
    parts[f"a batch of {batch}"] = max(reading, logits_bytes)
    return in_words(parts, "a smaller --batch-size")


def in_words(parts: Mapping[str, int], advice: str) -> str:
    """Return what parts take together, and each of them, in bytes.

    Args:
        parts: By name.
        advice: What takes less.

    Raises:
        InputError: If that is more than the machine has.
    """
    total = sum(parts.values())
    said = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
    text = f"memory: about {total / 1e9:.2f} GB ({said})"
    if total > machine.memory_bytes():
        raise InputError(
            f"{text}, but this machine has {machine.memory_bytes() / 1e9:.1f} GB; use {advice}"
        )
    return text


def trained_arrays(network: nn.Module) -> list[mx.array]:
    """Return a network's trainable parameters."""
    arrays: dict[str, Any] = dict(tree_flatten(network.trainable_parameters()))
    return list(arrays.values())


def update_bytes(trained: Sequence[mx.array]) -> int:
    """Return what an update makes beside weights, gradients and moments."""
    sizes = sorted((array.size for array in trained), reverse=True)
    small = [size for size in sizes if size < LARGE]
    large = sizes[0] if sizes and sizes[0] >= LARGE else 0  # the first waits for none
    return int(4 * UPDATED * (sum(small[:AHEAD]) + large))


def _backward_bytes(student: nn.Module, work: Work, largest: int) -> int:
    """Return what a loss and its gradients take, while all activations are there."""
    layers = [work.learned.size * size for size in layer_bytes(student, work.learned.width)]
    most = max(layers, default=0)
    entries, tokens = vocab_width(student), work.learned.size * work.learned.width
    rows = min(tokens, chunk_rows(entries))
    chunk = int((CHUNKS if tokens > rows else ONE_CHUNK) * 4 * rows * entries)
    kept = most if work.checkpointed else sum(layers)
    return kept + most + max(chunk + largest, HEADS * largest)


def _reading_bytes(network: nn.Module, batch: Batch) -> int:
    """Return what reading takes: of one layer after the other."""
    return batch.size * max(layer_bytes(network, batch.width), default=0)


def _judging_bytes(student: nn.Module, batch: Batch) -> int:
    entries = vocab_width(student)
    rows = min(batch.size * batch.width, judged_rows(entries))
    return _reading_bytes(student, batch) + int(JUDGED * 4 * rows * entries)


def _writing_bytes(student: nn.Module, batch: Batch) -> int:
    """Return what the caches take, which grow by steps, and the logits of a token each."""
    width = -(-batch.width // WRITING_STEP) * WRITING_STEP
    logits = int(WRITTEN * 4 * batch.size * vocab_width(student))
    return batch.size * width * cached_bytes(student) + logits


def cached_bytes(model: nn.Module) -> int:
    """Return what a model keeps of a token that it reads; nothing is computed."""
    caches = fresh_caches(model)
    model(mx.array([[0, 0]]), cache=caches)
    return num_bytes([cache.state for cache in caches]) // 2


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
