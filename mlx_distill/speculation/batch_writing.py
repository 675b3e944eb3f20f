"""The texts of a batch as responses: what the engine hands out of them."""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generation_stream

from mlx_distill.compat import wired
from mlx_distill.speculation.batched_text import BatchedText, Written
from mlx_distill.speculation.batching import TextBatch
from mlx_distill.speculation.plain_batch import KIND, PlainBatch
from mlx_distill.speculation.responses import GenerationResponse, ResponseWriter

# Tokens of all texts after which memory that nobody uses is given back.
TIDY_AFTER = 2048


@dataclass(frozen=True)
class Emitted:
    """The next token of a text.

    Args:
        request: The number that ``submit`` returned.
        response: The token, its text, and the counters; its ``finish_reason`` ends the text.
    """

    request: int
    response: GenerationResponse


@dataclass(frozen=True)
class Failed:
    """A text that could not go on.

    Args:
        request: The number that ``submit`` returned.
        error: What happened.
    """

    request: int
    error: BaseException


class BatchWriter:
    """Writes texts together, and ends each where it ends by itself.

    Args:
        model: Writes.
        size: So many texts share a call at the most.
    """

    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size
        self.batches: dict[Hashable, TextBatch | PlainBatch] = {}
        self._texts: dict[int, tuple[BatchedText, ResponseWriter]] = {}
        self._running = ExitStack()
        self._tokens = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the texts that have not ended."""
        return tuple(self._texts)

    def submit(self, text: BatchedText, writer: ResponseWriter) -> None:
        """Write a text from the next step on."""
        writer.begin()
        self._texts[text.number] = text, writer
        if text.kind not in self.batches:
            plain = text.kind == KIND
            batch = PlainBatch(self.model, self.size) if plain else TextBatch(self.size)
            self.batches[text.kind] = batch
        self.batches[text.kind].join(text)

    def step(self) -> Iterator[Emitted | Failed]:
        """Yield what one call of each kind of rows adds to its texts.

        Those that end have ended then.

        Raises:
            BaseException: What broke off the call of all; none of the texts goes on then.
        """
        if not self._texts:
            return
        try:
            self._start()
            written = [one for batch in self.batches.values() for one in batch.step()]
        except BaseException:
            self.close()
            raise
        for one in written:
            yield from self._responses(one)
        if not self._texts:
            self._running.close()

    def cancel(self, number: int) -> None:
        """End a text; a prompt cache then holds what was handed out."""
        found = self._texts.pop(number, None)
        if found is not None:
            self.batches[found[0].kind].leave(found[0])

    def close(self) -> None:
        """End all texts."""
        self._texts = {}
        with ExitStack() as stack:
            for batch in self.batches.values():
                stack.callback(batch.abandon)
            stack.callback(self._running.close)
            self.batches = {}

    def _responses(self, one: Written) -> Iterator[Emitted | Failed]:
        text = one.text
        if text.number not in self._texts:  # it was cancelled while the others were handed out
            return
        _, writer = self._texts[text.number]
        if one.error is not None:
            self.cancel(text.number)
            yield Failed(text.number, one.error)
            return
        for number, token in enumerate(one.tokens, start=1):
            text.hand_out(number, len(one.tokens), token.token)
            response = writer.write(token)
            self._tokens += 1
            if response.finish_reason:
                self.cancel(text.number)
            yield Emitted(text.number, response)
            if response.finish_reason:
                break
        if self._tokens >= TIDY_AFTER:
            self._tokens = 0
            mx.clear_cache()

    def _start(self) -> None:
        """Set what holds as long as there are texts."""
        if any(batch.is_busy for batch in self.batches.values()):
            return
        self._running.close()
        streams = [generation_stream]
        self._running.enter_context(wired(self.model, streams))
