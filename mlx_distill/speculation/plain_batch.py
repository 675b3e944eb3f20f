"""Texts that mlx-lm's own generator of batches writes, where that is faster.

It takes greedy texts that need nothing which only rows of a batch have: no prompt cache of their
own, no processors, no draft. ``calibration.batches`` finds out where it is faster.
"""

from collections.abc import Callable
from contextlib import closing

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator

from mlx_distill.arrays import to_host
from mlx_distill.speculation.batched_text import BatchedText, Written
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.decoding import DecodedToken, failed_after
from mlx_distill.speculation.requests import Request

# Of texts that mlx-lm writes; no rows are of this kind.
KIND = "mlx-lm"
FAILED = -1  # in place of a token where the logits are no numbers
ENDLESS = 10**9  # when a text ends is not the generator's to say


class PlainBatch:
    """Texts that are written together, as a ``TextBatch`` writes them.

    Args:
        model: Writes.
        size: So many texts share a call at the most; others wait.
    """

    def __init__(self, model: nn.Module, size: int):
        self.texts: dict[int, BatchedText] = {}
        self._open: Callable[[], BatchGenerator] = lambda: BatchGenerator(
            model,
            sampler=_best,
            completion_batch_size=size,
            prefill_batch_size=min(size, 8),
        )
        self._generator: BatchGenerator | None = None
        self._left: list[int] = []

    @property
    def is_busy(self) -> bool:
        """Whether a call is on its way, or is to be made."""
        return bool(self.texts)

    def join(self, text: BatchedText) -> None:
        """Let a text take part from the next step on."""
        self._generator = self._generator or self._open()
        (number,) = self._generator.insert([to_host(text.prompt)], max_tokens=[ENDLESS])
        self.texts[number] = text

    def leave(self, text: BatchedText) -> None:
        """End a text."""
        text.ended = True
        self._left += [number for number, one in self.texts.items() if one is text]

    def step(self) -> list[Written]:
        """Return what was added to the texts: a token each, of those whose prompts are read."""
        generator = self._generator
        if generator is None:
            return []
        if self._left:
            generator.remove(self._left)
            for number in self._left:
                del self.texts[number]
            self._left = []
        if not self.texts:
            self.abandon()
            return []
        return [
            _written(self.texts[one.uid], one.token, one.logprobs)
            for one in generator.next_generated()
        ]

    def abandon(self) -> None:
        """End all texts."""
        if self._generator is not None:
            with closing(self._generator):
                self._generator = None
        self.texts, self._left = {}, []


def _written(text: BatchedText, token: int, log_probs: mx.array) -> Written:
    number, text.num_tokens = text.num_tokens, text.num_tokens + 1
    if token == FAILED:
        return Written(text, error=failed_after(number))
    if number:
        text.decoding.counters.add([0], 0)
    return Written(text, [DecodedToken(token, log_probs, None, False)])


def _best(log_probs: mx.array) -> mx.array:
    """Return the likeliest tokens; it is part of what is computed anyway whether there are any."""
    best = mx.argmax(log_probs, axis=-1).astype(mx.int32)
    return mx.where(mx.isnan(log_probs[..., 0]), FAILED, best)


def can_write(request: Request) -> bool:
    """Return whether a text needs nothing but what mlx-lm's generator does."""
    config = request.cache
    return (
        request.sampling.temperature == 0
        and not request.logits_processors
        and request.prompt_cache is None
        and config == CacheConfig(prefill_step_size=config.prefill_step_size)
    )
