"""The engine: requests in, tokens out; ``stream_generate`` is an engine with one request.

    engine = Engine(model, tokenizer, drafter)
    numbers = [engine.submit(Request(prompt)) for prompt in prompts]
    while engine.busy:
        for one in engine.step():
            print(one.request, one.response.text)

Every text has a drafting state, a cache and random numbers of its own, so its tokens do not depend
on which others are written meanwhile. With a batch of more than one, texts share the calls of the
target (``batching``): a step hands out what one call added to each of them. Otherwise, and where a
text's cache cannot be a row of a batch, the texts take turns: a step hands out the next token of
each, and a text's call is made when its turn comes.
"""

import itertools
import sys
import time
from collections.abc import Hashable
from contextlib import ExitStack
from functools import cached_property

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generation_stream

from mlx_distill.blas.openblas import drafting_threads, let_draft
from mlx_distill.compat import wired
from mlx_distill.core.sampling import TextNoise
from mlx_distill.data.tokens import usable_tokenizer
from mlx_distill.drafters.draft_model import DraftModelDrafter
from mlx_distill.drafters.nothing import NoDrafter, NoPlanner
from mlx_distill.drafters.protocol import Drafter, Planner
from mlx_distill.errors import InputError
from mlx_distill.limits import check_value, plain
from mlx_distill.speculation import checks
from mlx_distill.speculation.batch_writing import BatchWriter, Emitted, Failed
from mlx_distill.speculation.batched_text import BatchedText
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.decoding import DecodedTokens, decode
from mlx_distill.speculation.draft_verification import once_noise, takes_blocks
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.speculation.plain import PlainDecoding, decode_plainly
from mlx_distill.speculation.plain_batch import KIND, can_write
from mlx_distill.speculation.requests import BatchSize, Request
from mlx_distill.speculation.responses import Responses, ResponseWriter
from mlx_distill.speculation.sharing import Alone, sharing
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.speculation.two_caches import TwoCaches
from mlx_distill.target.context import position_limit
from mlx_distill.target.exact import ExactTarget
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target
from mlx_distill.untyped import Tokenizer

# Of texts: no two in a process have the same, since a planner may serve several engines.
_numbers = itertools.count()


class Engine:
    """Writes the texts that are asked for, with one model.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer.
        drafter: Drafts; None decodes plainly.
        draft_model: A small model of the same tokenizer that drafts instead.
        num_draft_tokens: Tokens that it drafts at a time.
        draft_verification: Of its chains, as ``stream_generate``'s.
        batch: So many texts share a call of the target at the most.
        exact_rows: Whether a drafted text has to be the plainly decoded one in every precision,
            to the last bit; such texts share no calls.
        plain_batches: Whether mlx-lm's own generator of batches writes the texts that need nothing
            else; without drafts.

    Raises:
        InputError: If the drafter was made for another model, or the model cannot be drafted for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        drafter: Drafter | None = None,
        draft_model: nn.Module | None = None,
        num_draft_tokens: int = 3,
        batch: int = 1,
        exact_rows: bool = False,
        plain_batches: bool = False,
        draft_verification: str | None = None,
    ):
        self.model = model
        self.tokenizer = usable_tokenizer(tokenizer)
        self.drafter = drafter
        self.draft_model = draft_model
        self.num_draft_tokens = num_draft_tokens = plain(num_draft_tokens)
        self.draft_verification = draft_verification
        if draft_model is not None:
            checks.check_draft_model(draft_model, drafter, num_draft_tokens)
        elif draft_verification is not None:
            raise InputError("draft_verification is for the chains of a draft_model; name one")
        self.batch = batch = plain(batch)
        check_value("batch", batch, BatchSize)
        self.exact_rows = plain(exact_rows)
        check_value("exact_rows", self.exact_rows, bool)
        self.plain_batches = plain_batches
        self._texts: dict[int, Responses] = {}
        self._together = BatchWriter(model, batch)
        self._said = False
        self._ready: list[Emitted] = []
        self._failed: list[Failed] = []

    @cached_property
    def positions(self) -> int | None:
        """How many positions the model has a learned row for; None where it computes them."""
        return position_limit(self.model)

    @cached_property
    def _exact(self) -> ExactTarget | None:
        return ExactTarget(self.model) if self.exact_rows else None

    @property
    def _target(self) -> Target:
        return self._exact or Target.of(self.model)

    @property
    def texts(self) -> tuple[int, ...]:
        """The numbers of the texts that have not ended."""
        return (*self._texts, *self._together.numbers)

    @property
    def busy(self) -> bool:
        """Whether any text has not ended, or an error waits to be raised."""
        return bool(self.texts or self._ready or self._failed)

    def submit(self, request: Request) -> int:
        """Return the number of a new text; all that can be refused is refused now.

        Raises:
            InputError: If the prompt is longer than the model's context, a token is none of the
                model's, or the caches cannot be used.
        """
        number, counters = next(_numbers), DraftCounters()
        caches = self._caches(request)
        max_tokens = checks.check_request(self.model, self.positions, request, caches)
        size = request.prompt.size
        writer = ResponseWriter(self.tokenizer, size, max_tokens, request.stop, counters)
        if self.batch > 1:
            kind = self._kind(request, caches, max_tokens)
            if not isinstance(kind, Alone):
                plain = kind == KIND
                decoding = self._shared(request, number, caches, max_tokens, counters, plain)
                text = BatchedText(number, decoding, request.prompt, kind)
                self._together.submit(text, writer)
                return number
            if not self._said:
                print(f"mlx_distill: texts are written one by one: {kind.why}", file=sys.stderr)
            self._said = True
        plainly = self.drafter is None and self.draft_model is None
        decode = self._plain if plainly else self._drafted
        tokens = decode(request, number, caches, max_tokens, counters)
        self._texts[number] = self._responses(writer, tokens)
        return number

    def responses(self, number: int) -> Responses:
        """Yield what a text comes to that is written by itself, and alone: no step is needed."""
        try:
            yield from self._texts[number]
        finally:
            self.cancel(number)

    def step(self) -> list[Emitted]:
        """Return the next tokens of every text that has not ended.

        An error ends the text that it comes from; what other texts have ready is returned by the
        next step.
        """
        self._advance()
        if self._failed:
            raise self._failed.pop(0).error
        ready, self._ready = self._ready, []
        return ready

    def advance(self) -> list[Emitted | Failed]:
        """Return the same, with the errors of texts that failed among them."""
        self._advance()
        found: list[Emitted | Failed] = [*self._ready, *self._failed]
        self._ready, self._failed = [], []
        return found

    def cancel(self, number: int) -> None:
        """End a text; a prompt cache then holds what was handed out.

        A token that was ready when another text's error broke a step off is not handed out any
        more; the cache holds that, too.
        """
        self._ready = [one for one in self._ready if one.request != number]
        self._failed = [one for one in self._failed if one.request != number]
        self._end(number)

    def _end(self, number: int) -> None:
        text = self._texts.pop(number, None)
        if text is not None:
            text.close()
        self._together.cancel(number)

    def close(self) -> None:
        """End all texts, whatever one of them meets."""
        self._ready, self._failed = [], []
        with ExitStack() as stack:
            for number in self.texts:
                stack.callback(self._end, number)

    def _advance(self) -> None:
        if self._ready or self._failed:  # of a step that raised
            return
        for one in self._together.step():
            if isinstance(one, Failed):
                self._failed.append(one)
            else:
                self._ready.append(one)
        for number, text in list(self._texts.items()):
            try:
                response = next(text, None)
            except BaseException as error:
                del self._texts[number]
                if not isinstance(error, Exception):
                    raise
                self._failed.append(Failed(number, error))
                continue
            if response is not None:
                self._ready.append(Emitted(number, response))
            if response is None or response.finish_reason:
                self._end(number)

    def _responses(self, writer: ResponseWriter, tokens: DecodedTokens) -> Responses:
        with wired(self.model, [generation_stream]):
            yield from writer.responses(tokens)

    def _plain(
        self,
        request: Request,
        number: int,
        caches: PromptCache,
        max_tokens: int,
        counters: DraftCounters,
    ) -> DecodedTokens:
        """Return the tokens of a text by mlx-lm's loop."""
        plain = PlainDecoding(
            self._exact.steps() if self._exact else self.model,
            request.sampling,
            request.cache,
            caches,
            request.logits_processors,
            max_tokens,
            request.prompt_cache is not None,
            counters,
        )
        return decode_plainly(plain, request.prompt, mx.random.key(_seed(request)))

    def _drafted(
        self,
        request: Request,
        number: int,
        caches: PromptCache,
        max_tokens: int,
        counters: DraftCounters,
    ) -> DecodedTokens:
        """Return the tokens of a text by the drafting loop."""
        target, drafter = self._target, self.drafter
        two = None
        if self.draft_model is not None:
            drafter = self._draft_model_drafter(target, request)
            if request.prompt_cache is not None:
                two = TwoCaches(caches, self.model, drafter)
                caches = two.target
        assert drafter is not None
        checks.check_drafter(drafter, target, self.tokenizer, request.planner)
        target.check_caches(caches)
        planner = request.planner
        planner = planner if isinstance(planner, Planner) else planner()
        decoding = self._decoding(request, number, caches, (drafter, planner), max_tokens, counters)
        tokens = _with_drafting_threads(decoding, request.prompt)
        return tokens if two is None else two.kept(decoding, request.prompt, tokens)

    def _kind(self, request: Request, caches: PromptCache, max_tokens: int) -> Hashable | Alone:
        """Return which texts a text shares calls with, or why it shares none."""
        if self.plain_batches and can_write(request) and not self.exact_rows:
            return KIND
        if self.exact_rows:
            return Alone("exact rows are those of a text alone")
        if self.draft_model is not None and request.prompt_cache is not None:
            return Alone("their prompt caches are those of a model and of its draft model")
        return sharing(Target.of(self.model), request, caches, max_tokens)

    def _shared(
        self,
        request: Request,
        number: int,
        caches: PromptCache,
        max_tokens: int,
        counters: DraftCounters,
        plain: bool,
    ) -> Decoding:
        """Return a text that shares calls with others; nothing is drafted for a ``plain`` one."""
        target, drafter = Target.of(self.model), None if plain else self.drafter
        if self.draft_model is not None and not plain:
            drafter = self._draft_model_drafter(target, request)
        if drafter is None:
            drafts = NoDrafter(), NoPlanner()
        else:
            checks.check_drafter(drafter, target, self.tokenizer, request.planner)
            planner = request.batch_planner or request.planner
            drafts = drafter, planner if isinstance(planner, Planner) else planner()
        return self._decoding(request, number, caches, drafts, max_tokens, counters)

    def _decoding(
        self,
        request: Request,
        number: int,
        caches: PromptCache,
        drafts: tuple[Drafter, Planner],
        max_tokens: int,
        counters: DraftCounters,
    ) -> Decoding:
        """Return what a text needs that a drafter and a planner draft for."""
        target = self._target
        key, size = mx.random.key(_seed(request)), target.vocab_size
        return Decoding(
            target,
            *drafts,
            request.sampling,
            TextNoise(key, size) if request.sampling.temperature else None,
            request.cache,
            caches,
            request.logits_processors,
            keep_caches=request.prompt_cache is not None,
            max_tokens=max_tokens,
            text=number,
            positions=self.positions,
            counters=counters,
            once=once_noise(drafts[0], key, size),
        )

    def _draft_model_drafter(self, target: Target, request: Request) -> DraftModelDrafter:
        """Return a draft model that drafts for one text."""
        assert self.draft_model is not None
        as_blocks = takes_blocks(request, self.draft_verification, self.exact_rows)
        law, size = request.sampling if as_blocks else None, request.cache.max_kv_size
        drafter = DraftModelDrafter(self.draft_model, target.vocab_size, size, law=law)
        checks.check_windows(self.num_draft_tokens, drafter.new_caches())
        return drafter

    def _caches(self, request: Request) -> PromptCache:
        """Return the caches of a text: those that it brings, or new ones."""
        caches = request.prompt_cache
        if caches is None:
            caches = prompt_caches(self.model, request.cache.max_kv_size)
        elif self.draft_model is None:
            checks.check_layers(self.model, caches)
        else:
            checks.check_prompt_cache(caches)
        if self.draft_model is not None:
            checks.check_windows(self.num_draft_tokens, caches)
        return caches


def _with_drafting_threads(decoding: Decoding, prompt: mx.array) -> DecodedTokens:
    with drafting_threads():
        let_draft(False)  # before it drafts, it reads the prompt
        yield from decode(decoding, prompt)


def _seed(request: Request) -> int:
    return time.time_ns() % 2**63 if request.seed is None else request.seed
