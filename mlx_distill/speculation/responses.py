"""Tokens into responses: the text of each, the counters so far, and where the answer ends."""

import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_distill.arrays import log_probs
from mlx_distill.speculation.decoding import DecodedToken, DecodedTokens
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.speculation.stop_texts import StopCutter


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


Responses: TypeAlias = Generator[GenerationResponse, None, None]


class ResponseWriter:
    """Writes the responses of one answer, and ends it where plain decoding ends it.

    Args:
        tokenizer: The model's.
        prompt_tokens: Length of the prompt.
        max_tokens: The longest answer.
        stop: Texts that end it.
        counters: What the decoding did so far.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompt_tokens: int,
        max_tokens: int,
        stop: tuple[str, ...],
        counters: DraftCounters,
    ):
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.counters = counters
        self._detokenizer = tokenizer.detokenizer
        self._cutter = StopCutter(stop)
        self._count = self._accepted = 0
        self._prompt_tps = 0.0
        self._start = time.perf_counter()

    def responses(self, tokens: DecodedTokens) -> Responses:
        """Yield a response per token until the answer ends; the last one when the caches settled.

        The answer's time begins with the first response that is asked for.
        """
        self.begin()
        response = None
        with closing(tokens):
            for one in tokens:
                response = self.write(one)
                if response.finish_reason:
                    break
                yield response
                if self._count % 256 == 0:
                    mx.clear_cache()
        if response is not None:
            yield response

    def begin(self) -> None:
        """Let the answer's time begin, with its prompt."""
        self._start = time.perf_counter()

    def write(self, one: DecodedToken) -> GenerationResponse:
        """Return the response of one more token; its ``finish_reason`` ends the answer."""
        self._count += 1
        self._accepted += one.from_draft
        now = time.perf_counter()
        if self._count == 1:
            self._prompt_tps = self.prompt_tokens / (now - self._start)
            self._start = time.perf_counter()
        text, reason = self._text(one.token)
        counters = self.counters
        return GenerationResponse(
            text=text,
            token=one.token,
            logprobs=one.logits,
            logits_row=one.row,
            from_draft=one.from_draft,
            prompt_tokens=self.prompt_tokens,
            prompt_tps=self._prompt_tps,
            generation_tokens=self._count,
            generation_tps=self._count / (time.perf_counter() - self._start),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            target_calls=counters.target_calls,
            tokens_per_call=self._count / max(counters.target_calls, 1),
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=self._accepted,
            verified_tokens=counters.verified_tokens,
            beam_tokens=counters.beam_tokens,
            acceptance_by_depth=tuple(counters.acceptance_by_depth),
        )

    def _text(self, token: int) -> tuple[str, str | None]:
        """Return what a token adds to the text, and why the text ends with it, if it does."""
        reason = "length" if self._count == self.max_tokens else None
        if token in self.tokenizer.eos_token_ids:
            reason = "stop"
        else:
            # A padded head has tokens that no tokenizer knows. Most of mlx-lm's detokenizers go on
            # behind them; that of SentencePiece has no place for one.
            with suppress(IndexError):
                self._detokenizer.add_token(token)
        if reason:
            self._detokenizer.finalize()
        text = self._cutter.feed(self._detokenizer.last_segment, last=reason is not None)
        return text, "stop" if self._cutter.stopped else reason
