"""Text from a model: mlx-lm's interface, with a drafter.

``stream_generate`` and ``generate`` take what mlx-lm's functions of that name take and yield what
they yield, with the counters of the drafting beside it. Without a drafter, mlx-lm's own loop
decodes.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from jaxtyping import Int
from mlx import nn
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.generate import (
    generate_step,
    generation_stream,
    speculative_generate_step,
    wired_limit,
)
from mlx_lm.models.cache import RotatingKVCache, can_trim_prompt_cache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_distill.core.sampling import Sampling, TextNoise, log_probs, sample
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.drafters.registry import check_fingerprint, fingerprint
from mlx_distill.errors import InputError, not_numbers
from mlx_distill.openblas import drafting_threads
from mlx_distill.speculation.decoding import (
    CacheConfig,
    Decoding,
    Emitted,
    LogitsProcessor,
    decode,
)
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.target.context import context_length
from mlx_distill.target.reading import vocab_width
from mlx_distill.target.target import Target
from mlx_distill.target.tree_cache import cached_tokens


@dataclass
class GenerationResponse(MlxLmResponse):
    """mlx-lm's response, one per token, and what drafting did so far.

    ``logprobs`` is computed whenever it is read; for that a response holds the logits of all nodes
    that were verified with its token. Of a long text, keep what you need and not the responses.

    Args:
        target_calls: Forward passes of the target; prefill does not count.
        tokens_per_call: generation_tokens / target_calls.
        drafted_tokens: Tokens that the drafter proposed for verification.
        accepted_tokens: Of those, the ones that became text.
        verified_tokens: Tree nodes sent to the target.
        beam_tokens: What the same beams would have cost without prefix sharing.
        acceptance_by_depth: Share of the calls that accepted at least 1, 2, ... drafted tokens.
        logits_row: Which row of the logits that it holds the token was drawn from; None if it holds
            the log-probabilities themselves.
    """

    target_calls: int = 0
    tokens_per_call: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verified_tokens: int = 0
    beam_tokens: int = 0
    acceptance_by_depth: tuple[float, ...] = ()

    logits_row: int | None = field(default=None, repr=False)

    @property
    def logprobs(self) -> mx.array:
        """What the token was drawn from: normalised log-probabilities of all tokens."""
        if self.logits_row is None:
            return self._logits
        return log_probs(self._logits[self.logits_row])

    @logprobs.setter
    def logprobs(self, logits: mx.array) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._logits = logits


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    *,
    drafter: Drafter | None = None,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 3,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: list[Any] | None = None,
    plan: DraftPlan | None = None,
    cache: CacheConfig | None = None,
) -> Iterator[GenerationResponse]:
    """Yield a response per token that the model writes after a prompt.

    The distribution of the text is the model's own, with and without a drafter.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer.
        prompt: A text, or token ids.
        drafter: From ``load_drafter``; None decodes plainly.
        draft_model: A small model of the same tokenizer that drafts instead, by mlx-lm's own loop;
            ``prompt_cache`` then holds the caches of both, as in mlx-lm.
        num_draft_tokens: Tokens that it drafts at a time.
        max_tokens: The longest answer, in tokens.
        temperature: 0 takes the most probable token.
        top_p: Draw from the smallest set of tokens with this probability; 1 is all.
        top_k: Draw from this many tokens; 0 is all.
        min_p: Draw from tokens at least this many times as probable as the best; 0 is all.
        seed: Repeats the random numbers.
        stop: Texts that end the answer; they are not part of it.
        logits_processors: As mlx-lm's; they see the prompt and the answer so far.
        prompt_cache: From ``mlx_lm.models.cache.make_prompt_cache``; holds the text before the
            prompt, and afterwards the prompt and the answer too.
        plan: The shape of the drafts.
        cache: How keys and values are kept.

    Raises:
        InputError: If a value is out of its range, the prompt is empty or longer than the model's
            context, or the drafter was made for another model.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p)
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    if any(not text for text in stop):
        raise InputError("a stop text must not be empty")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = prompt_tokens(tokenizer, prompt)
    cache = cache or CacheConfig()
    caches = make_prompt_cache(model, cache.max_kv_size) if prompt_cache is None else prompt_cache
    if draft_model is not None:
        _check_draft_model(drafter, num_draft_tokens)
        if prompt_cache is None:
            caches = [*caches, *make_prompt_cache(draft_model, cache.max_kv_size)]
        if not can_trim_prompt_cache(caches):
            raise InputError("a draft model needs caches that can be trimmed; use --drafter")
    _check_length(model, tokens, caches, cache)
    sampling.check_vocabulary(_vocab_size(model, tokenizer))
    if cache.kv_bits is not None:
        _check_quantization(model, cache)
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"seed must be between 0 and 2**63, got {seed}")
    key = mx.random.key(time.time_ns() % 2**63 if seed is None else seed)
    processors = tuple(logits_processors or ())
    if draft_model is not None:
        counters = DraftCounters()
        mx.random.seed(time.time_ns() % 2**63 if seed is None else seed)
        emitted = _decode_with_model(
            model,
            draft_model,
            num_draft_tokens,
            tokens,
            sampling,
            cache,
            caches,
            processors,
            max_tokens,
            counters,
        )
    elif drafter is None:
        counters = DraftCounters()
        emitted = _decode_plainly(
            model, tokens, sampling, key, cache, caches, processors, max_tokens, counters
        )
    else:
        target = Target.of(model)
        target.require_drafting()
        _check_drafter(drafter, target, tokenizer)
        target.check_caches(caches)
        noise = TextNoise(key, target.vocab_size) if temperature else None
        decoding = Decoding(
            target, drafter, plan or DraftPlan(), sampling, noise, cache, caches, processors
        )
        counters = decoding.counters
        emitted = _decode_drafted(decoding, tokens, complete=prompt_cache is not None)
    # All of the above is checked now, not when the first token is asked for.
    return _responses(model, tokenizer, tokens, emitted, counters, max_tokens, tuple(stop))


def generate(
    model: nn.Module, tokenizer: Any, prompt: str | Sequence[int] | mx.array, **options: Any
) -> str:
    """Return the text that the model writes after a prompt; see ``stream_generate``."""
    return "".join(
        response.text for response in stream_generate(model, tokenizer, prompt, **options)
    )


def prompt_tokens(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> Int[mx.array, " T"]:
    """Return the token ids of a prompt.

    Raises:
        InputError: If there are none.
    """
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt, chat_template=False)
    tokens = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)
    if tokens.ndim != 1 or tokens.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    return tokens.astype(mx.int32)


def _decode_drafted(decoding: Decoding, tokens: mx.array, complete: bool) -> Iterator[Emitted]:
    """Yield the tokens of the drafting loop.

    ``complete`` is for a cache that the caller will go on with: as after plain decoding, it has to
    end up with every token that was handed out, and the last one may not be in it yet.
    """
    one = None
    with drafting_threads():
        try:
            with closing(decode(decoding, tokens)) as emitted:  # pyright: ignore
                for one in emitted:
                    yield one
        finally:
            if complete and one is not None and not one.from_draft:
                decoding.target.forward(mx.array([one.token]), decoding.caches)
                decoding.cache.quantize(decoding.caches)
                mx.eval([part.state for part in decoding.caches])


def _decode_plainly(
    model: nn.Module,
    tokens: mx.array,
    sampling: Sampling,
    key: mx.array,
    cache: CacheConfig,
    caches: list[Any],
    processors: tuple[LogitsProcessor, ...],
    max_tokens: int,
    counters: DraftCounters,
) -> Iterator[Emitted]:
    """Yield the tokens of mlx-lm's own loop."""
    noise, places = None, itertools.count()

    def sampler(logits: mx.array) -> mx.array:
        nonlocal noise
        if sampling.temperature and noise is None:
            noise = TextNoise(key, logits.shape[-1])
        rows = None if noise is None else noise.rows(next(places), 1)
        return sample(logits.astype(mx.float32), sampling, rows)  # normalised by mlx-lm

    steps = generate_step(
        tokens,
        model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=list(processors),
        prompt_cache=caches,
        prefill_step_size=cache.prefill_step_size,
        kv_bits=cache.kv_bits,
        kv_group_size=cache.kv_group_size,
        quantized_kv_start=cache.quantized_kv_start,
    )
    with closing(steps):
        for number, (token, logits) in enumerate(steps):
            # One entry tells: mlx-lm has normalised them.
            if mx.isnan(logits[0]).item():
                raise not_numbers(f"after {number} tokens of its answer")
            if number:
                counters.add([0], 0)
            yield Emitted(int(token), logits, None, False)


def _decode_with_model(
    model: nn.Module,
    draft_model: nn.Module,
    num_draft_tokens: int,
    tokens: mx.array,
    sampling: Sampling,
    cache: CacheConfig,
    caches: list[Any],
    processors: tuple[LogitsProcessor, ...],
    max_tokens: int,
    counters: DraftCounters,
) -> Iterator[Emitted]:
    """Yield the tokens of mlx-lm's own loop with a draft model.

    It draws at every drafted place from the model's distribution and accepts what is equal, so the
    law is the model's.
    """
    steps = speculative_generate_step(
        tokens,
        model,
        draft_model,
        num_draft_tokens=num_draft_tokens,
        max_tokens=max_tokens,
        sampler=sampling.mlx_lm_sampler(vocab_width(model)),
        logits_processors=list(processors),
        prompt_cache=caches,
        prefill_step_size=cache.prefill_step_size,
        kv_bits=cache.kv_bits,
        kv_group_size=cache.kv_group_size,
        quantized_kv_start=cache.quantized_kv_start,
    )
    accepted = 0
    with closing(steps):
        for number, (token, logits, from_draft) in enumerate(steps):
            if mx.isnan(logits[0]).item():
                raise not_numbers(f"after {number} tokens of its answer")
            accepted += from_draft
            done = number + 1
            if not from_draft or done == max_tokens:  # a call ends with the model's own token
                drafted = min(num_draft_tokens, max_tokens - done + accepted + (not from_draft))
                counters.add([0, *range(drafted)], accepted)
                accepted = 0
            yield Emitted(int(token), logits, None, bool(from_draft))


def _check_draft_model(drafter: Drafter | None, num_draft_tokens: int) -> None:
    if drafter is not None:
        raise InputError("a drafter and a draft model exclude each other")
    if num_draft_tokens < 1:
        raise InputError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")


def _responses(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    emitted: Iterator[Emitted],
    counters: DraftCounters,
    max_tokens: int,
    stop: tuple[str, ...],
) -> Iterator[GenerationResponse]:
    """Turn tokens into responses, and end the text where plain decoding ends it."""
    detokenizer = tokenizer.detokenizer
    cutter = StopCutter(stop)
    start = time.perf_counter()
    prompt_tps = 0.0
    accepted = 0
    response = None
    with wired_limit(model, [generation_stream]), closing(emitted):  # pyright: ignore
        for count, one in enumerate(emitted, start=1):
            if count == 1:
                prompt_tps = prompt.size / (time.perf_counter() - start)
                start = time.perf_counter()
            accepted += one.from_draft
            reason = "length" if count == max_tokens else None
            if one.token in tokenizer.eos_token_ids:
                reason = "stop"
            else:
                detokenizer.add_token(one.token)
            if reason:
                detokenizer.finalize()
            text = cutter.feed(detokenizer.last_segment, last=reason is not None)
            reason = "stop" if cutter.stopped else reason
            response = GenerationResponse(
                text=text,
                token=one.token,
                logprobs=one.logits,
                logits_row=one.row,
                from_draft=one.from_draft,
                prompt_tokens=prompt.size,
                prompt_tps=prompt_tps,
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=reason,
                target_calls=counters.target_calls,
                tokens_per_call=count / max(counters.target_calls, 1),
                drafted_tokens=counters.drafted_tokens,
                accepted_tokens=accepted,
                verified_tokens=counters.verified_tokens,
                beam_tokens=counters.beam_tokens,
                acceptance_by_depth=tuple(counters.acceptance_by_depth),
            )
            if reason:
                break
            yield response
            if count % 256 == 0:
                mx.clear_cache()
    if response is not None:
        yield response  # the last one, when the caches are settled


class StopCutter:
    """Cuts a text that comes in pieces before the first of some stop texts.

    What could be the beginning of a stop text is held back until it is known not to be.

    Args:
        stop: The texts that end it.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.stopped = False
        self._held = ""

    def feed(self, piece: str, last: bool = False) -> str:
        """Return what can be handed out after one more piece; after the last one, everything."""
        text = self._held + piece
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, end) for end in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def _check_length(
    model: nn.Module, tokens: mx.array, caches: list[Any], cache: CacheConfig
) -> None:
    """Raise InputError if a prompt is longer than what the model was made for."""
    context = context_length(model)
    windows = (c.max_size for c in caches if isinstance(c, RotatingKVCache))
    if context is None or cache.max_kv_size in windows:
        return
    offset = cached_tokens(caches)
    if offset + tokens.size > context:
        earlier = f" after {offset} cached ones" if offset else ""
        raise InputError(
            f"the prompt has {tokens.size} tokens{earlier}, the model's context is {context}; "
            "shorten it"
        )


def _check_quantization(model: nn.Module, cache: CacheConfig) -> None:
    """Raise InputError if the model's caches cannot be quantised so; nothing is computed."""
    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    replace(cache, quantized_kv_start=0).quantize(caches)


def _vocab_size(model: nn.Module, tokenizer: TokenizerWrapper) -> int:
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    return size if isinstance(size, int) else len(tokenizer)


def _check_drafter(drafter: Any, target: Target, tokenizer: TokenizerWrapper) -> None:
    """Raise InputError if a drafter says that it was made for another target."""
    if getattr(drafter, "target", None):
        check_fingerprint(drafter.target, fingerprint(target, tokenizer))
