"""What a machine could do at most, and what a call has to do at least.

    ceiling_ms = max(bytes / bandwidth, operations / rate)

The machine is measured, not looked up: bandwidth by a large copy and by a large matrix times a
vector, the better of the two, and the rate by a large product of matrices, in the model's type.
Bytes and operations are estimated from the weights and the cache: every weight that takes part is
read once per call, every cached token once, and a weight makes two operations per row. What a
model keeps in the processor's own cache may come faster than the bandwidth measured here.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_distill.arrays import num_bytes, num_parameters
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.speculation.phases import arrays_in
from mlx_distill.target.layer_cache import arrays_of, leaves
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target

# Of the arrays that are copied; several times what processors cache.
COPIED_BYTES = 2**28
# The product is made larger until it takes so long; a type that is slow here is measured small.
LONG_ENOUGH_S, SMALLEST, LARGEST = 0.05, 256, 8192


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches in one type of numbers.

    Args:
        dtype: The type.
        copy_bytes_per_s: Of a large copy, what is read and what is written.
        matvec_bytes_per_s: Of a large matrix times a vector.
        flops_per_s: Of a large product of matrices.
    """

    dtype: str
    copy_bytes_per_s: float
    matvec_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth."""
        return max(self.copy_bytes_per_s, self.matvec_bytes_per_s)

    @classmethod
    def measured(cls, dtype: mx.Dtype) -> "Ceilings":
        """Measure this machine; it takes about a second."""
        columns = 4096
        matrix = mx.ones((COPIED_BYTES // columns // dtype.size, columns), dtype)
        vector = mx.ones((columns, 1), dtype)
        mx.eval(matrix, vector)
        copied = 2 * matrix.nbytes / _best_s(lambda: matrix + 1)
        read = matrix.nbytes / _best_s(lambda: matrix @ vector)
        return cls(str(dtype).rpartition(".")[2], copied, read, _flops_per_s(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self) | {"bytes_per_s": self.bytes_per_s}


@dataclass(frozen=True)
class Work:
    """What a call has to do at least.

    Args:
        bytes: That are read.
        flops: Operations on numbers.
    """

    bytes: int | float
    flops: int | float

    def ceiling_ms(self, ceilings: Ceilings) -> float:
        """Return the least time that it can take."""
        return 1e3 * max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops_per_s)


def of_call(model: nn.Module, rows: int, context: int) -> Work:
    """Return what a target does on some rows after a text of so many tokens."""
    weight_bytes, num_weights = _weights(model, rows)
    cache_bytes, cached_width = _cache(model, context)
    attention = 4 * rows * context * cached_width
    return Work(weight_bytes + cache_bytes, 2 * rows * num_weights + attention)


def of_draft(drafter: Drafter, plan: DraftPlan) -> Work | None:
    """Return what a recurrent drafter does in one draft; None for one without a network."""
    network = getattr(drafter, "network", None)
    if not isinstance(network, nn.Module):
        return None
    length, count = plan.draft_length, num_parameters(network)
    rows = 1 + (length - 1) * plan.beam_width
    return Work(length * num_bytes(network.parameters()), 2 * rows * count)


def of_walk(vocab_size: int, rows: int, dtype: mx.Dtype) -> Work:
    """Return what drawing a token at every node does: it reads the logits."""
    return Work(rows * vocab_size * dtype.size, rows * vocab_size)


def _weights(model: nn.Module, rows: int) -> tuple[float, float]:
    """Return the bytes of the weights that a call reads, and their number for one row.

    Of an embedding that is not the head, too, only the rows' own entries are read; of experts, no
    more than are asked.
    """
    size, count = float(num_bytes(model.parameters())), float(num_parameters(model))
    target = Target.of(model)
    if target.embed is not None and target.head.given and target.head.module is not target.embed:
        size -= num_bytes(target.embed.parameters())
        count -= num_parameters(target.embed)
    chosen = getattr(getattr(model, "args", None), "num_experts_per_tok", None)
    for module in model.modules():
        weight = module.get("weight")
        if isinstance(chosen, int) and isinstance(weight, mx.array) and weight.ndim == 3:
            experts = weight.shape[0]
            size -= num_bytes(module.parameters()) * (1 - min(1, rows * chosen / experts))
            count -= num_parameters(module) * (1 - chosen / experts)
    return size, count


def _cache(model: nn.Module, context: int) -> tuple[float, float]:
    """Return the bytes of a cached text, and how wide the queries are that look at a token of it.

    The width is summed over the layers.
    """
    caches = prompt_caches(model, None)
    Target.of(model).forward(mx.array([0, 0]), caches)
    heads = getattr(getattr(model, "args", None), "num_attention_heads", None)
    size = width = 0.0
    for cache in leaves(caches):
        kept = arrays_in(arrays_of([cache]))
        if not hasattr(cache, "keys"):  # a state, however long the text is
            size += sum(array.nbytes for array in kept)
            continue
        tokens = min(context, getattr(cache, "max_size", None) or context)
        size += sum(array.nbytes / array.shape[-2] * tokens for array in kept)
        keys = kept[0]
        own = heads if isinstance(heads, int) else keys.shape[1]
        width += own * keys.shape[-1] * tokens / max(1, context)
    return size, width


def _flops_per_s(dtype: mx.Dtype) -> float:
    """Return the operations per second of a product of large matrices."""
    size = SMALLEST
    while True:
        matrix = mx.ones((size, size), dtype)
        mx.eval(matrix)
        seconds = _best_s(lambda m=matrix: m @ m)
        if seconds >= LONG_ENOUGH_S or size >= LARGEST:
            return 2 * size**3 / seconds
        size *= 2


def _best_s(build: Callable[[], mx.array], runs: int = 5) -> float:
    """Return the shortest time of some runs, which others disturb least, after one to warm up."""
    mx.eval(build())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        mx.eval(build())
        times.append(time.perf_counter() - start)
    return min(times)
