"""What is refused before the first token."""

from dataclasses import replace

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_distill.arrays import to_number
from mlx_distill.drafters.fingerprint import check_fingerprint, fingerprint
from mlx_distill.drafters.protocol import (
    NO_STATIC_TREE,
    Drafter,
    DraftLength,
    DraftPlan,
    FixedPlanner,
    Planner,
    has_static_tree,
    is_drafter,
)
from mlx_distill.errors import InputError, one_line
from mlx_distill.limits import check_value
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.speculation.drafted_text import LogitsProcessor
from mlx_distill.speculation.ledger import UNUSABLE, Unusable
from mlx_distill.speculation.requests import Request
from mlx_distill.target.context import context_length
from mlx_distill.target.layer_cache import cached_tokens, leaves
from mlx_distill.target.reading import read_whole, vocab_width
from mlx_distill.target.taps import find_layer
from mlx_distill.target.target import Target


def check_request(
    model: nn.Module, positions: int | None, request: Request, caches: PromptCache
) -> int:
    """Return how many tokens the answer can have: as many as asked for, or as have positions.

    Args:
        model: Writes.
        positions: How many it has a learned row for; None where it computes them.
        request: What is asked for.
        caches: The text's.

    Raises:
        InputError: If the prompt is longer than what the model was made for, one of its tokens is
            none of the model's, or a setting does not fit the model.
    """
    if any(isinstance(cache, Unusable) for cache in caches):
        raise UNUSABLE
    size = _vocab_size(model)
    _check_tokens(request.prompt, size)
    _check_context(model, request, caches)
    request.sampling.check_vocabulary(size)
    if request.cache.kv_bits is not None:
        _check_quantization(model, request.cache)
    if positions is None:
        return request.max_tokens
    # The last token of an answer is read, too, before it is known to be the last.
    read = cached_tokens(caches) + request.prompt.size
    room = positions - read
    if room < 1:
        raise InputError(
            f"the prompt leaves no room for an answer: with it, {read} tokens fill "
            f"the model's {positions} positions; shorten it"
        )
    return min(request.max_tokens, room)


def cache_config(given: object) -> CacheConfig:
    """Return how keys and values are kept; InputError if that is not what was given."""
    if given is None or isinstance(given, CacheConfig):
        return given or CacheConfig()
    raise InputError(f"cache must be a CacheConfig, got {given!r:.60}")


def check_plan(plan: object) -> None:
    """Raise InputError if something is neither the shape of drafts nor what plans it."""
    if plan is None or (isinstance(plan, DraftPlan | Planner) and not isinstance(plan, type)):
        return
    raise InputError(f"plan must be a DraftPlan, or plan drafts, got {plan!r:.60}")


def stop_texts(given: object) -> tuple[str, ...]:
    """Return the texts that end an answer, of one, several or none.

    Raises:
        InputError: If it is anything else.
    """
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    if isinstance(given, list | tuple) and all(isinstance(text, str) for text in given):
        return tuple(given)
    raise InputError(f"stop must be texts, got {given!r:.60}")


def processors(given: object) -> tuple[LogitsProcessor, ...]:
    """Return logits processors; InputError if that is not what was given."""
    if given is None or (isinstance(given, list | tuple) and all(map(callable, given))):
        return tuple(given or ())
    raise InputError(f"logits_processors must be a list of functions, got {given!r:.60}")


def check_layers(model: nn.Module, caches: PromptCache) -> None:
    """Raise InputError if a prompt cache is another model's.

    With fewer layers, a model of mlx-lm computes as many of its own and says nothing.
    """
    check_prompt_cache(caches)
    size = len(make_prompt_cache(model))
    if len(caches) != size:
        raise InputError(f"the prompt cache has {len(caches)} layers; the model has {size}")


def check_prompt_cache(caches: object) -> None:
    """Raise InputError if something is no prompt cache."""
    if not isinstance(caches, list) or not all(hasattr(cache, "state") for cache in caches):
        raise InputError(f"prompt_cache must be a list from make_prompt_cache, got {caches!r:.60}")


def check_drafter(
    drafter: object, target: Target, tokenizer: TokenizerWrapper, planner: object = None
) -> None:
    """Raise InputError if the target cannot be drafted for, or not with this drafter.

    The layers that it taps have to be there, and trees that are planned have to be made by it.
    """
    target.require_drafting()
    if not is_drafter(drafter):
        raise InputError(f"a {type(drafter).__name__} is no drafter; load one with load_drafter")
    made_for = getattr(drafter, "target", None)
    if made_for:
        check_fingerprint(made_for, fingerprint(target, tokenizer))
    drafted = getattr(getattr(drafter, "config", None), "vocab_size", 0)
    if drafted > target.vocab_size:
        raise InputError(
            f"the drafter was loaded for a model of {drafted} tokens, this one has "
            f"{target.vocab_size}; load it for this one"
        )
    for tap in drafter.taps:
        find_layer(target.model, tap)
    static = isinstance(planner, FixedPlanner) and planner.plan.tree == "static"
    if static and not has_static_tree(drafter):
        raise InputError(NO_STATIC_TREE)


def check_draft_model(draft_model: object, drafter: Drafter | None, num_draft_tokens: int) -> None:
    """Raise InputError if a draft model cannot be used."""
    if not isinstance(draft_model, nn.Module):
        raise InputError(f"draft_model must be a loaded model, got {draft_model!r:.60}")
    if drafter is not None:
        raise InputError("a drafter and a draft model exclude each other")
    check_value("num_draft_tokens", num_draft_tokens, DraftLength)


def check_windows(num_draft_tokens: int, caches: PromptCache) -> None:
    """Raise InputError if a draft would not fit into the shortest window of the caches."""
    sizes = (one.max_size for one in leaves(caches) if isinstance(one, RotatingKVCache))
    shortest = min(sizes, default=None)
    if shortest is not None and num_draft_tokens >= shortest:
        raise InputError(
            f"num_draft_tokens must be below the window's {shortest} tokens, got {num_draft_tokens}"
        )


def _vocab_size(model: nn.Module) -> int:
    """Return the number of a model's tokens, as its configuration or its head says it."""
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    return size if isinstance(size, int) else vocab_width(model)


def _check_tokens(prompt: mx.array, size: int) -> None:
    """Raise InputError if a token would be read from beyond the embedding."""
    lowest, highest = to_number(prompt.min()), to_number(prompt.max())
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"the prompt holds the token {wrong}; the model has {size}")


def _check_context(model: nn.Module, request: Request, caches: PromptCache) -> None:
    """Raise InputError if a prompt is longer than what the model was made for."""
    context = context_length(model)
    windows = (c.max_size for c in caches if isinstance(c, RotatingKVCache))
    if context is None or request.cache.max_kv_size in windows:
        return
    offset, size = cached_tokens(caches), request.prompt.size
    if offset + size > context:
        earlier = f" after {offset} cached ones" if offset else ""
        raise InputError(
            f"the prompt has {size} tokens{earlier}, the model's context is {context}; shorten it"
        )


def _check_quantization(model: nn.Module, cache: CacheConfig) -> None:
    """Raise InputError if the model's caches cannot be quantised so, or not be read then.

    Nothing is computed.
    """
    caches = make_prompt_cache(model)
    read_whole(model, mx.array([[0]]), cache=caches)
    replace(cache, quantized_kv_start=0).quantize(caches)
    try:
        read_whole(model, mx.array([[0]]), cache=caches)
    except Exception as error:
        raise InputError(
            f"this model's attention cannot read a quantised cache, {one_line(error)}; leave out "
            "kv_bits"
        ) from None
