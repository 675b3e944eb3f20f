"""Many texts from a model: ``batch_generate``.

    answers = batch_generate(model, tokenizer, ["Once upon a time", "The cat"], drafter=drafter)
    print(answers[0].text)

A text that cannot be written fails by itself, and its answer says why; the others go on.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_distill.calibration.automatic import is_on
from mlx_distill.calibration.batches import batch_choice
from mlx_distill.calibration.choosing import choice
from mlx_distill.calibration.pair import Pair
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan, Planner
from mlx_distill.errors import InputError
from mlx_distill.limits import check_value, listed, plain
from mlx_distill.speculation import checks
from mlx_distill.speculation.batch_planning import BatchPlanner
from mlx_distill.speculation.batch_writing import Failed
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.generation import planner_for, text_request
from mlx_distill.speculation.requests import BatchSize
from mlx_distill.speculation.responses import GenerationResponse
from mlx_distill.untyped import Settings, Tokenizer

Prompt = str | Sequence[int] | mx.array
BATCH = 8
# What may be said of each text.
OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "logits_processors", "prompt_cache"),
)


@dataclass
class Answer:
    """What became of a prompt.

    Args:
        index: Its place among the prompts.
        text: The answer; what there was of it, if it failed.
        tokens: Its tokens.
        finish_reason: "stop", "length", or "error".
        error: What ended it; None if nothing did.
        last: The last response, with the counters; None before the first.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    last: GenerationResponse | None = None

    def add(self, response: GenerationResponse) -> None:
        """Take in one more token."""
        self.text += response.text
        self.tokens.append(response.token)
        self.finish_reason = response.finish_reason
        self.last = response

    def fail(self, error: BaseException) -> "Answer":
        """Take in what ended it."""
        self.error, self.finish_reason = error, "error"
        return self


def batch_planner_of(
    model: nn.Module, drafter: Drafter, sampled: bool = False
) -> BatchPlanner | None:
    """Return the planner of all batches of a pair; None where nothing is to be measured.

    Args:
        model: The target's.
        drafter: Drafts for it.
        sampled: Whether tokens are drawn, and not the likeliest.
    """
    if not is_on():
        return None
    try:
        known = _planners.setdefault(drafter, {})
    except TypeError:  # a drafter that cannot be a key
        return BatchPlanner()
    of, planner = known.get((id(model), sampled), (None, None))
    if of is None or of() is not model or planner is None:
        planner = BatchPlanner()
        known[id(model), sampled] = weakref.ref(model), planner
    return planner


_Known = dict[tuple[int, bool], tuple[weakref.ref[nn.Module], BatchPlanner]]
_planners: weakref.WeakKeyDictionary[Drafter, _Known] = weakref.WeakKeyDictionary()


def batch_generate(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any
) -> list[Answer]:
    """Return the answers to several prompts, in their order; see ``answer_steps``."""
    answers = stream_answers(model, tokenizer, prompts, **options)
    return sorted(answers, key=lambda answer: answer.index)


def stream_answers(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any
) -> Iterator[Answer]:
    """Yield the answers to several prompts, as they are ready; see ``answer_steps``."""
    for ready in answer_steps(model, tokenizer, prompts, **options):
        yield from ready


def answer_steps(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    each: Sequence[Settings] | None = None,
    batch: int = BATCH,
    drafter: Drafter | None = None,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 3,
    draft_verification: str | None = None,
    plan: DraftPlan | Planner | None = None,
    cache: CacheConfig | None = None,
    exact_rows: bool = False,
    **options: Any,
) -> Iterator[list[Answer]]:
    """Yield, after every call of the texts that are written, the answers that it has ended.

    The texts share the calls of the model. Each is what it would be alone: the same tokens at
    temperature 0 (as far as the model's arithmetic is exact), and the same from the same seed.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer.
        prompts: Texts, or token ids.
        each: Further options of each text, which go before those of all.
        batch: So many texts are written at the same time.
        drafter: From ``load_drafter``; None decodes plainly.
        draft_model: A small model of the same tokenizer that drafts instead.
        num_draft_tokens: Tokens that it drafts at a time.
        draft_verification: As ``stream_generate``'s.
        plan: As ``stream_generate``'s.
        cache: As ``stream_generate``'s.
        exact_rows: As ``stream_generate``'s; such texts are written one by one.
        options: Of all texts, as ``stream_generate``'s: ``max_tokens``, ``temperature``, ``top_p``,
            ``top_k``, ``min_p``, ``seed``, ``stop``, ``logits_processors``; and ``prompt_cache``,
            which only one text can go on with.

    Raises:
        InputError: If the drafter does not fit the model, ``each`` not the prompts, or two texts
            have the same prompt cache.
    """
    batch = plain(batch)
    check_value("batch", batch, BatchSize)
    checks.check_plan(plan)
    prompts = listed("prompts", prompts)
    _check_each(each, len(prompts))
    _check_caches(each or [{}] * len(prompts), options)
    cache = checks.cache_config(cache)
    if isinstance(drafter, AutoDrafter):  # a trial times one text at a time
        pair = Pair(model, tokenizer, drafter, cache, exact_rows)
        drafter = choice(pair, drafter, _is_sampled(options), plan, alone=False).drafter
    pair = Pair(model, tokenizer, drafter or NoDrafter(), cache, exact_rows)
    measured = plan is None and draft_model is None
    texts, sampled = min(batch, len(prompts)), _is_sampled(options)
    ways = batch_choice(pair, texts, sampled) if measured else None
    way = "rows" if ways is None else ways.way(pair)
    if ways is not None and not ways.drafts:
        drafter = None
    engine = Engine(
        model,
        tokenizer,
        drafter,
        draft_model,
        num_draft_tokens,
        batch=1 if way == "alone" else batch,
        exact_rows=exact_rows,
        plain_batches=way == "mlx-lm",
        draft_verification=draft_verification,
    )
    shared = None
    if plan is None and drafter is not None:
        shared = batch_planner_of(model, drafter, sampled)
    if ways is not None and shared is not None:
        ways.teach(shared, texts)
    try:
        yield from _answers(engine, prompts, each, cache, plan, shared, options, batch)
    finally:
        engine.close()
        if ways is not None and shared is not None:
            ways.learn(shared.gain(texts))


def _check_each(each: object, num_prompts: int) -> None:
    """Raise InputError unless these are options for every prompt, or nothing."""
    if each is None:
        return
    if not isinstance(each, list | tuple) or not all(isinstance(one, Mapping) for one in each):
        raise InputError(f"each must be a list of options by name, got {each!r:.60}")
    if len(each) != num_prompts:
        raise InputError(f"each must have an entry per prompt: {num_prompts}, got {len(each)}")
    for name in sorted({str(name) for one in each for name in one} - set(OPTIONS)):
        raise InputError(f"each has the option {name}; a text's are {', '.join(OPTIONS)}")


def _check_caches(each: Sequence[Settings], options: Settings) -> None:
    """Raise InputError if two texts would be written into one prompt cache."""
    brought = [{**options, **one}.get("prompt_cache") for one in each]
    # Lists of their own may hold the same caches.
    layers = [id(layer) for caches in brought if isinstance(caches, list) for layer in caches]
    if len(set(layers)) < len(layers):
        raise InputError("a prompt cache is of one text; give every text its own, with each")


def _answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    each: Sequence[Settings] | None,
    cache: CacheConfig,
    plan: DraftPlan | Planner | None,
    shared: BatchPlanner | None,
    options: Settings,
    batch: int,
) -> Iterator[list[Answer]]:
    """Yield the answers that each step of an engine ends; it writes ``batch`` of them at a time."""
    left = iter(enumerate(prompts))
    writing: dict[int, Answer] = {}
    while True:
        ready: list[Answer] = []
        while len(writing) < batch and (following := next(left, None)) is not None:
            index, prompt = following
            answer, own = Answer(index), {**options, **(each[index] if each else {})}
            try:
                planner = planner_for(engine, plan, cache, _is_sampled(own))
                own |= {"planner": planner, "cache": cache, "batch_planner": shared}
                writing[engine.submit(text_request(engine, prompt, **own))] = answer
            except InputError as error:
                ready.append(answer.fail(error))
        if not writing:
            yield ready
            return
        for one in engine.advance():
            answer = writing[one.request]
            if isinstance(one, Failed):
                ready.append(writing.pop(one.request).fail(one.error))
                continue
            answer.add(one.response)
            if answer.finish_reason:
                ready.append(writing.pop(one.request))
        yield ready


def _is_sampled(options: Settings) -> bool:
    """Return whether tokens are drawn, and not the likeliest."""
    return options.get("temperature") not in (None, 0)
