"""How fast models decode, each on its own, without drafting."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx_lm

from mlx_distill.errors import InputError
from mlx_distill.evaluation.models import Loaded
from mlx_distill.target.context import text_limit

SPEED_PROMPT, SPEED_RUNS = 32, 3


def decoding_speeds(
    loaded: Mapping[str, Loaded], prompts: Mapping[str, list[int]], num_tokens: int
) -> dict[str, float]:
    """Return how many tokens per second mlx-lm decodes greedily, the median of three runs.

    Models take turns, so that a machine whose speed drifts does not decide.

    Args:
        loaded: The models by name.
        prompts: Of each; all but their first 32 tokens are left out.
        num_tokens: Decoded per run.

    Raises:
        InputError: If that is beyond a model's context.
    """
    starts = {name: prompts[name][:SPEED_PROMPT] for name in loaded}
    for name, one in loaded.items():
        context = text_limit(one.model)
        if context is not None and len(starts[name]) + num_tokens > context:
            raise InputError(
                f"speed_tokens {num_tokens} after a prompt of {len(starts[name])} are beyond "
                f"the context of {name}, {context}"
            )
        _decoding_speed(one, starts[name], min(num_tokens, 16))  # what is compiled is so afterwards
    runs: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(SPEED_RUNS):
        for name, one in loaded.items():
            runs[name].append(_decoding_speed(one, starts[name], num_tokens))
    return {name: statistics.median(values) for name, values in runs.items()}


def _decoding_speed(one: Loaded, prompt: list[int], num_tokens: int) -> float:
    """Return the tokens per second after the first one; texts do not end before they are full."""
    times = []
    with _endless(one.tokenizer):
        mx.synchronize()
        for _ in mlx_lm.stream_generate(one.model, one.tokenizer, prompt, num_tokens):
            times.append(time.perf_counter())
    return (len(times) - 1) / max(times[-1] - times[0], 1e-9)


@contextmanager
def _endless(tokenizer: Any) -> Iterator[None]:
    """Let no token end a text meanwhile."""
    ends = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = set()
    try:
        yield
    finally:
        tokenizer.eos_token_ids = ends
