"""What it costs to draw from a large vocabulary, by kind of filter, beside mlx-lm's samplers."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_distill.core.sampling import Sampling, sample, sample_fast

LAWS = (
    Sampling(1.0),
    Sampling(1.0, top_p=0.95),
    Sampling(1.0, top_k=40),
    Sampling(0.7, top_p=0.9, top_k=50),
    Sampling(1.0, min_p=0.05),
)
ROUNDS = 7


def sampler_times(num_rows: int, num_entries: int) -> list[dict[str, Any]]:
    """Return, for each law, how long a draw from every row takes, in milliseconds.

    The four ways take turns; medians. mlx-lm's sampler makes its noise itself, ours is given it: a
    text's noise is made once for every token, not for every node that might become one.

    Args:
        num_rows: Drawn from at once.
        num_entries: Of the vocabulary; the logits are normal, with a spread of 3.
    """
    mx.random.seed(0)
    logits = 3 * mx.random.normal((num_rows, num_entries))
    noise = mx.random.gumbel(logits.shape)
    mx.eval(logits, noise)
    return [_times(logits, noise, law) for law in LAWS if law.top_k <= num_entries]


def _times(logits: mx.array, noise: mx.array, law: Sampling) -> dict[str, Any]:
    theirs = law.mlx_lm_sampler(logits.shape[-1])
    ways: dict[str, Callable[[], Any]] = {
        "mlx_lm_ms": lambda: theirs(logits - mx.logsumexp(logits, axis=-1, keepdims=True)),
        "sorted_ms": lambda: sample(logits, law, noise),
        "ours_ms": lambda: [x for x in sample_fast(logits, law, noise) if x is not None],
        "noise_ms": lambda: mx.random.gumbel(logits.shape),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            mx.eval(way())
            if turn:  # the first compiles what is compiled
                times[name].append(1e3 * (time.perf_counter() - start))
    chosen = {
        name: value
        for name, value in vars(law).items()
        if name == "temperature" or value != getattr(Sampling(), name)
    }
    return {"law": chosen, **{name: statistics.median(found) for name, found in times.items()}}
