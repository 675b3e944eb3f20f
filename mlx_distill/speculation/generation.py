"""Text from a model: mlx-lm's interface, with a drafter.

``stream_generate`` and ``generate`` take a model, a tokenizer and a prompt as mlx-lm's functions of
that name do, and yield what they yield, with the counters of the drafting beside it. The law is
named by its numbers and not by a sampler. Without a drafter, mlx-lm's own loop decodes.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Int
from mlx import nn

from mlx_distill.calibration.automatic import planner_of
from mlx_distill.calibration.choosing import choice
from mlx_distill.calibration.pair import Pair
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan, FixedPlanner, Planner
from mlx_distill.errors import InputError
from mlx_distill.speculation import checks
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.drafted_text import LogitsProcessor
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request
from mlx_distill.speculation.responses import Responses
from mlx_distill.untyped import Tokenizer


def stream_generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    *,
    drafter: Drafter | None = None,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 3,
    draft_verification: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: PromptCache | None = None,
    plan: DraftPlan | Planner | None = None,
    cache: CacheConfig | None = None,
    exact_rows: bool = False,
) -> Responses:
    """Yield a response per token that the model writes after a prompt.

    The distribution of the text is the model's own, with and without a drafter.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer.
        prompt: A text, or token ids.
        drafter: From ``load_drafter``, whose "auto" is whichever is fastest; None decodes plainly.
        draft_model: A small model of the same tokenizer that drafts instead; ``prompt_cache`` then
            holds the caches of both, as in mlx-lm.
        num_draft_tokens: Tokens that it drafts at a time, in a chain; a ``plan`` says otherwise.
        draft_verification: How a draft model's chains are verified above temperature 0: "block"
            draws them from its own law and accepts most of them, so that which text a seed gives
            depends on the draft model and on how much it drafts; with "coupled", it is the text
            that the seed gives without. None takes blocks where it can: not for trees, not with
            logits processors and not with exact rows.
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
        plan: The shape of the drafts, or what plans it anew for each of them. Without it, the
            measured costs of this machine decide, and at the first use of a pair they are
            measured, which takes up to 20 seconds. MLX_DISTILL_CALIBRATE=0 in the environment
            leaves that out: every draft is then a ``DraftPlan()``.
        cache: How keys and values are kept.
        exact_rows: Draft so that the text is the plainly decoded one to the last bit in half
            precision, with packed weights and with a quantised cache, too. Off a GPU that costs
            what drafting gains.

    Raises:
        InputError: If a value is out of its range, the prompt is empty or longer than the model's
            context, or the drafter was made for another model.
    """
    cache = checks.cache_config(cache)
    checks.check_plan(plan)
    sampled = Sampling(temperature, top_p, top_k, min_p).temperature > 0
    chosen = None
    if isinstance(drafter, AutoDrafter):
        pair = Pair(model, tokenizer, drafter, cache, exact_rows)
        chosen = choice(pair, drafter, sampled, plan, alone=not logits_processors)
        drafter = chosen.drafter
    engine = Engine(
        model,
        tokenizer,
        drafter,
        draft_model,
        num_draft_tokens,
        exact_rows=exact_rows,
        draft_verification=draft_verification,
    )
    request = text_request(
        engine,
        prompt,
        planner=planner_for(engine, chosen.plan if chosen else plan, cache, sampled),
        cache=cache,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        logits_processors=logits_processors,
        prompt_cache=prompt_cache,
    )
    # Whatever can be refused is refused now, not when the first token is asked for.
    responses = engine.responses(engine.submit(request))
    return responses if chosen is None else chosen.listen(responses)


def text_request(
    engine: Engine,
    prompt: str | Sequence[int] | mx.array,
    *,
    planner: Planner | Callable[[], Planner],
    cache: CacheConfig,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: PromptCache | None = None,
    batch_planner: Planner | None = None,
) -> Request:
    """Return what an engine is asked for; the options are ``stream_generate``'s.

    Raises:
        InputError: If a value is out of its range, or the prompt is empty.
    """
    return Request(
        prompt=prompt_tokens(engine.tokenizer, prompt),
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_p, top_k, min_p),
        seed=seed,
        stop=checks.stop_texts(stop),
        logits_processors=checks.processors(logits_processors),
        prompt_cache=prompt_cache,
        planner=planner,
        cache=cache,
        batch_planner=batch_planner,
    )


def planner_for(
    engine: Engine,
    plan: DraftPlan | Planner | Callable[[], Planner] | None,
    cache: CacheConfig,
    sampled: bool,
) -> Planner | Callable[[], Planner]:
    """Return who says how much an engine drafts: what was asked for, else the measured costs."""
    if plan is None and engine.drafter is not None:
        exact = engine.exact_rows
        pair = Pair(engine.model, engine.tokenizer, engine.drafter, cache, exact)
        return partial(planner_of, pair, sampled=sampled)
    if plan is None and engine.draft_model is not None:
        plan = chain_of(engine.num_draft_tokens)
    return FixedPlanner(plan or DraftPlan()) if isinstance(plan, DraftPlan | None) else plan


def chain_of(num_tokens: int) -> DraftPlan:
    """Return the shape of a draft of so many tokens in a row."""
    return DraftPlan(1, num_tokens, num_tokens + 1)


def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str | Sequence[int] | mx.array, **options: Any
) -> str:
    """Return the text that the model writes after a prompt; see ``stream_generate``."""
    return "".join(
        response.text for response in stream_generate(model, tokenizer, prompt, **options)
    )


def prompt_tokens(
    tokenizer: Tokenizer, prompt: str | Sequence[int] | mx.array
) -> Int[mx.array, " T"]:
    """Return the token ids of a prompt.

    Raises:
        InputError: If there are none, or it is neither.
    """
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt, chat_template=False)
    refused = InputError(f"a prompt is a text or token ids, got {prompt!r:.60}")
    try:
        if isinstance(prompt, bytes | bytearray | Mapping | Set):
            raise refused
        given = prompt if isinstance(prompt, mx.array) else mx.array(np.array(list(prompt)))
    except (TypeError, ValueError, RuntimeError):
        raise refused from None
    if given.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    if given.ndim != 1 or not mx.issubdtype(given.dtype, mx.integer):
        raise refused
    tokens = given.astype(mx.int32)
    if given.dtype != mx.int32 and (tokens != given).any().item():
        raise refused
    return tokens
