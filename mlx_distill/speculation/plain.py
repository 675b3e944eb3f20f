"""Decoding without a drafter: mlx-lm's own loop."""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generate_step

from mlx_distill.arrays import to_number
from mlx_distill.core.sampling import Sampling, TextNoise, sample
from mlx_distill.kernels.sampler import draw_tokens
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.cycle import failed_after, no_numbers
from mlx_distill.speculation.decoding import DecodedToken, DecodedTokens
from mlx_distill.speculation.drafted_text import LogitsProcessor
from mlx_distill.speculation.ledger import PlainLedger
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.target.tree_cache import can_trim
from mlx_distill.untyped import Fields


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

    def options(self, sampler: Callable[[mx.array], mx.array]) -> Fields:
        """Return the arguments of mlx-lm's loop."""
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


@dataclass(frozen=True)
class Draw:
    """What a token was drawn from.

    Args:
        log_probs: Of the tokens.
        noise: That was added; None at temperature 0.
        failed: Whether the log-probabilities are no numbers.
        certain: Whether the filters looked at enough of them; None where they look at all.
    """

    log_probs: mx.array
    noise: mx.array | None
    failed: mx.array
    certain: mx.array | None


class PlainSampler:
    """Draws as the drafting loop does, and notes where the logits are no numbers.

    The notes are computed beside the draws, so whoever has waited for a token finds its note ready:
    asking for it only then would wait for the model's next step.

    Args:
        sampling: How tokens are drawn.
        key: Of the text's random numbers.
        fast: Whether filters may leave a doubt, so that ``checked`` has to be asked.
        processed: Whether logits processors have been at what is drawn from.
    """

    def __init__(self, sampling: Sampling, key: mx.array, fast: bool, processed: bool):
        self.sampling = sampling
        self.processed = processed
        self.fast = fast
        self.draws: deque[Draw] = deque()
        self._key = key
        self._noise: TextNoise | None = None
        self._place = 0

    def __call__(self, log_probs: mx.array) -> mx.array:
        """Return a token per row of log-probabilities."""
        # mlx-lm has normalised them, so one entry tells of the model's.
        one = log_probs.reshape(-1)[:1]
        failed = no_numbers(log_probs) if self.processed else mx.isnan(one)
        if self.sampling.temperature and self._noise is None:
            self._noise = TextNoise(self._key, log_probs.shape[-1])
        rows = None if self._noise is None else self._noise.rows(self._place, 1)
        self._place += 1
        log_probs = log_probs.astype(mx.float32)
        if self.fast:
            token, _, certain = draw_tokens(log_probs, self.sampling, rows)
        else:
            token, certain = sample(log_probs, self.sampling, rows), None
        self.draws.append(Draw(log_probs, rows, failed, certain))
        # Sent with the token: what is sent by itself costs a few percent of a small model's step.
        notes = [failed] if certain is None else [failed, certain]
        return mx.depends([token], notes)[0]

    def checked(self, draw: Draw, token: int) -> int:
        """Return the token that filters of all tokens draw, where there is a doubt."""
        if draw.certain is None or draw.certain.all().item():
            return token
        return int(to_number(sample(draw.log_probs, self.sampling, draw.noise)))

    def forget(self) -> None:
        """Take back the draws that nobody has looked at."""
        self._place -= len(self.draws)
        self.draws.clear()


def _steps(
    decoding: PlainDecoding, sampler: PlainSampler, tokens: mx.array
) -> Generator[tuple[Draw, int, mx.array], None, None]:
    """Yield each draw, its token and the log-probabilities.

    mlx-lm's loop is one step ahead of the host. Where that step was given a token that should not
    have been drawn, which is very seldom, it is taken back and made again.
    """
    left = decoding.max_tokens
    prompt: mx.array | None = tokens
    while prompt is not None:
        options = decoding.options(sampler)
        options["max_tokens"] = left
        with closing(generate_step(prompt, decoding.model, **options)) as steps:
            prompt = None
            for drawn, logits in steps:
                left -= 1
                draw = sampler.draws.popleft()
                token = sampler.checked(draw, int(drawn))
                yield draw, token, logits
                if token != drawn:
                    prompt = mx.array([token])
                    break
        if prompt is not None:
            sampler.forget()
            for cache in decoding.caches:
                cache.trim(1)


def decode_plainly(decoding: PlainDecoding, tokens: mx.array, key: mx.array) -> DecodedTokens:
    """Yield the tokens of mlx-lm's own loop.

    Raises:
        InputError: If the model's logits are not numbers.
    """
    # A step can be taken back where nobody else has seen it.
    processed = bool(decoding.logits_processors)
    alone = not decoding.keep_caches and not processed
    fast = alone and all(map(can_trim, decoding.caches))
    sampler = PlainSampler(decoding.sampling, key, fast, processed)
    ledger = PlainLedger(decoding.caches, tokens.size) if decoding.keep_caches else None
    try:
        with closing(_steps(decoding, sampler, tokens)) as steps:
            for number, (draw, token, logits) in enumerate(steps):
                if draw.failed.item():
                    raise failed_after(number, processed)
                if number:
                    decoding.counters.add_plain()
                if ledger:
                    ledger.hand_out()
                yield DecodedToken(token, logits, None, False)
    except GeneratorExit:  # between two tokens, where mlx-lm's cache is as it should be
        raise
    except BaseException:
        if ledger:
            ledger.settle()
        raise
