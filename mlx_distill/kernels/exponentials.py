"""Exponentials on a processor, as powers of two.

    exp(x) = 2 ** (x log2 e)

Where MLX was built for any x86 processor it computes an exponential in about 10 ns, by a
polynomial whose every term is a call of the C library; a power is one call, of 3 ns. A probe finds
out which is faster here. What is made of powers differs from MLX's own in the last places.
"""

import math
import statistics
import time
from contextvars import ContextVar
from functools import cache

import mlx.core as mx
from jaxtyping import Float
from mlx import nn

from mlx_distill.arrays import row_sum
from mlx_distill.kernels.choice import mode

LOG2_E = math.log2(math.e)
# A power has to take no more than this share of an exponential's time.
CLEARLY, NUMBERS, ROUNDS = 0.7, 1 << 15, 5

# Whether MLX's own are taken, in this thread: where what a GPU would be sent is counted.
left_out: ContextVar[bool] = ContextVar("powers_left_out", default=False)


def by_powers() -> bool:
    """Return whether exponentials are made of powers: on a processor where these are faster."""
    if mx.default_device() != mx.Device(mx.cpu) or mode() == "off" or left_out.get():
        return False
    return mode() == "force" or _are_faster()


@cache
def _are_faster() -> bool:
    numbers = mx.random.normal((NUMBERS,), key=mx.random.key(0))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for powers in (True, False):
            start = time.perf_counter()
            mx.eval(mx.power(2.0, numbers) if powers else mx.exp(numbers))
            seconds[powers].append(time.perf_counter() - start)
    return statistics.median(seconds[True]) <= CLEARLY * statistics.median(seconds[False])


def sigmoid(x: Float[mx.array, "..."]) -> Float[mx.array, "..."]:
    """Return ``mx.sigmoid``."""
    if x.dtype != mx.float32 or not by_powers():
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(2.0, x * -LOG2_E))


def tanh(x: Float[mx.array, "..."]) -> Float[mx.array, "..."]:
    """Return ``mx.tanh``; by powers it is off by 1e-7, near zero as well."""
    if x.dtype != mx.float32 or not by_powers():
        return mx.tanh(x)
    return 2 / (1 + mx.power(2.0, x * (-2 * LOG2_E))) - 1


def silu(x: Float[mx.array, "..."]) -> Float[mx.array, "..."]:
    """Return ``nn.silu``."""
    if x.dtype != mx.float32 or not by_powers():
        return nn.silu(x)
    return x * sigmoid(x)


def log_sum_exp(x: Float[mx.array, "... V"]) -> Float[mx.array, "... 1"]:
    """Return ``mx.logsumexp`` of rows; -inf adds nothing. A GPU is sent one operation for it."""
    if x.dtype != mx.float32 or not by_powers():
        return mx.logsumexp(x, axis=-1, keepdims=True)
    top = x.max(axis=-1, keepdims=True)
    base = mx.where(mx.isinf(top), 0, top)  # of nothing but -inf the sum is none
    return base + mx.log(row_sum(mx.power(2.0, (x - base) * LOG2_E)))[..., None]
