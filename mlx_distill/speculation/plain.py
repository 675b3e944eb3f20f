"""Decoding without a drafter of ours: mlx-lm's own loops, alone and with a draft model."""

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generate_step, speculative_generate_step

from mlx_distill.core.sampling import Sampling, TextNoise, sample
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.cycle import LogitsProcessor, failed_after
from mlx_distill.speculation.decoding import DecodedToken, DecodedTokens
from mlx_distill.speculation.ledger import PlainLedger, give_up
from mlx_distill.speculation.statistics import DraftCounters


@dataclass
class PlainDecoding:
    """One text that is decoded without a drafter.

    Args:
        model: Writes.
        sampling: How tokens are drawn.
        cache: How keys and values are kept.
        caches: The prompt cache; it may hold earlier turns.
        logits_processors: As mlx-lm's.
        max_tokens: The longest answer.
        keep_caches: Whether the caller goes on with the prompt cache.
        counters: Counts what happens.
    """

    model: nn.Module
    sampling: Sampling
    cache: CacheConfig
    caches: PromptCache
    logits_processors: tuple[LogitsProcessor, ...]
    max_tokens: int
    keep_caches: bool
    counters: DraftCounters

    def options(self, sampler: Callable[[mx.array], mx.array]) -> dict[str, Any]:
        """Return the arguments that mlx-lm's loops share."""
        return {
            "max_tokens": self.max_tokens,
            "sampler": sampler,
            "logits_processors": list(self.logits_processors),
            "prompt_cache": self.caches,
            "prefill_step_size": self.cache.prefill_step_size,
            "kv_bits": self.cache.kv_bits,
            "kv_group_size": self.cache.kv_group_size,
            "quantized_kv_start": self.cache.quantized_kv_start,
        }


class PlainSampler:
    """Draws as the drafting loop does, and notes where the logits are no numbers.

    The notes are computed beside the draws, so whoever has waited for a token finds its note ready:
    asking for it only then would wait for the model's next step.

    Args:
        sampling: How tokens are drawn.
        key: Of the text's random numbers.
    """

    def __init__(self, sampling: Sampling, key: mx.array):
        self.sampling = sampling
        self.failed: deque[mx.array] = deque()
        self._key = key
        self._noise: TextNoise | None = None
        self._places = itertools.count()

    def __call__(self, log_probs: mx.array) -> mx.array:
        """Return a token per row of log-probabilities."""
        # One entry tells: mlx-lm has normalised them.
        failed = mx.isnan(log_probs.reshape(-1)[:1])
        mx.async_eval(failed)
        self.failed.append(failed)
        if self.sampling.temperature and self._noise is None:
            self._noise = TextNoise(self._key, log_probs.shape[-1])
        rows = None if self._noise is None else self._noise.rows(next(self._places), 1)
        return sample(log_probs.astype(mx.float32), self.sampling, rows)


def decode_plainly(decoding: PlainDecoding, tokens: mx.array, key: mx.array) -> DecodedTokens:
    """Yield the tokens of mlx-lm's own loop.

    Raises:
        InputError: If the model's logits are not numbers.
    """
    sampler = PlainSampler(decoding.sampling, key)
    ledger = PlainLedger(decoding.caches, tokens.size) if decoding.keep_caches else None
    steps = generate_step(tokens, decoding.model, **decoding.options(sampler))
    try:
        with closing(steps):
            for number, (token, logits) in enumerate(steps):
                if sampler.failed.popleft().item():
                    raise failed_after(number)
                if number:
                    decoding.counters.add([0], 0)
                if ledger:
                    ledger.hand_out()
                yield DecodedToken(int(token), logits, None, False)
    except GeneratorExit:  # between two tokens, where mlx-lm's cache is as it should be
        raise
    except BaseException:
        if ledger:
            ledger.settle()
        raise


def decode_with_model(
    decoding: PlainDecoding,
    draft_model: nn.Module,
    num_draft_tokens: int,
    vocab_size: int,
    tokens: mx.array,
) -> DecodedTokens:
    """Yield the tokens of mlx-lm's own loop with a draft model.

    It draws at every drafted place from the model's distribution and accepts what is equal, so the
    law is the model's.

    Raises:
        InputError: If the model's logits are not numbers.
    """
    sampler = decoding.sampling.mlx_lm_sampler(vocab_size)
    options = decoding.options(sampler)
    options["num_draft_tokens"] = num_draft_tokens
    steps = speculative_generate_step(tokens, decoding.model, draft_model, **options)
    max_tokens, accepted = decoding.max_tokens, 0
    try:
        with closing(steps):
            for number, (token, logits, from_draft) in enumerate(steps):
                if mx.isnan(logits[0]).item():
                    raise failed_after(number)
                accepted += from_draft
                done = number + 1
                if not from_draft or done == max_tokens:  # a call ends with the model's own token
                    left = max_tokens - done + accepted + (not from_draft)
                    drafted = min(num_draft_tokens, left)
                    decoding.counters.add([0, *range(drafted)], accepted)
                    accepted = 0
                yield DecodedToken(int(token), logits, None, bool(from_draft))
    except GeneratorExit:
        raise
    except BaseException:
        if decoding.keep_caches:
            give_up(decoding.caches)
        raise
