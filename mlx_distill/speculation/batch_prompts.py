"""The prompts of texts that begin together, read in the same calls.

    text 1   a b c d e | f        all but the last tokens, padded behind, in calls that no logits
    text 2   x y . . . | z        are computed of; then the last tokens, a row each
    text 3   p q r . . | s

Texts of very different lengths are read in several calls: what is padded is computed, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from mlx_distill.drafters.protocol import Features
from mlx_distill.speculation.batched_text import BatchedText
from mlx_distill.speculation.decoding import look_back, note_prompt, prefill
from mlx_distill.target.batch.rows import Rows
from mlx_distill.target.layer_cache import LayerCache, cached_tokens, leaves
from mlx_distill.target.prompt_cache import prompt_caches

# Texts are read together if the longest is at the most twice the shortest, or so much longer: what
# is padded is computed.
SLACK = 64


@dataclass(frozen=True)
class PromptsRead:
    """Prompts that were read.

    Args:
        rows: Their keys and values.
        logits: Of each the last token's.
        features: Of each the last tokens'.
    """

    rows: Rows
    logits: Sequence[Float[mx.array, "1 V"]]
    features: Sequence[Features]


def groups(texts: Sequence[BatchedText]) -> list[list[BatchedText]]:
    """Return texts by those that are read together."""
    found: list[list[BatchedText]] = []
    for text in sorted(texts, key=lambda text: (_kind(text) is None, text.prompt.size)):
        kind, first = _kind(text), found[-1][0] if found else None
        if (
            first is not None
            and kind is not None
            and kind == _kind(first)
            and text.prompt.size <= max(2 * first.prompt.size, first.prompt.size + SLACK)
        ):
            found[-1].append(text)
        else:
            found.append([text])
    return found


def read_prompts(texts: Sequence[BatchedText]) -> PromptsRead:
    """Read the prompts of some texts, which ``groups`` has put together."""
    if len(texts) == 1:
        decoding = texts[0].decoding
        logits, features = prefill(decoding, texts[0].prompt)
        note_prompt(decoding, texts[0].prompt)
        return PromptsRead(Rows.of(decoding.caches, decoding.prompt_tokens), [logits], [features])
    decoding, lengths = texts[0].decoding, [text.prompt.size - 1 for text in texts]
    target, taps = decoding.target, decoding.drafter.taps
    caches = prompt_caches(target.model, decoding.cache.max_kv_size)
    features = _beginnings(texts, lengths, caches)
    rows = Rows.read(caches, lengths)
    call = target.read_rows(mx.concatenate([text.prompt[-1:] for text in texts]), rows, taps)
    call.commit([[0]] * len(texts))
    last_logits = []
    for place, text in enumerate(texts):
        computed = call.of(place, 1)
        last_logits.append(computed.logits)
        last, before = Features(computed.hidden, None, computed.taps), features[place]
        wanted = look_back(text.decoding.drafter)
        features[place] = last if before is None else before.then(last, wanted)
        note_prompt(text.decoding, text.prompt)
    return PromptsRead(rows, last_logits, [one for one in features if one is not None])


def _kind(text: BatchedText) -> tuple[object, ...] | None:
    """Return what texts have in common that are read together; None by itself."""
    decoding, size = text.decoding, text.prompt.size
    cache, caches = decoding.cache, decoding.caches
    if size == 1 or cached_tokens(caches) or cache.kv_bits is not None:
        return None
    # Of what is read later, padding would drive the text out of a window.
    windows = any(isinstance(one, RotatingKVCache) for one in leaves(caches))
    if windows and size - 1 > cache.prefill_step_size:
        return None
    # A state cannot tell padding from text.
    states = any(isinstance(one, ArraysCache) for one in leaves(caches))
    return text.kind, cache.prefill_step_size, decoding.drafter.taps, size if states else None


def _beginnings(
    texts: Sequence[BatchedText], lengths: Sequence[int], caches: list[LayerCache]
) -> list[Features | None]:
    """Read all but the last tokens of prompts; return the features of the last of those."""
    target, taps = texts[0].decoding.target, texts[0].decoding.drafter.taps
    wanted = [look_back(text.decoding.drafter) for text in texts]
    features: list[Features | None] = [None] * len(texts)
    for start, tokens in _chunks(texts, max(lengths)):
        _, hidden, tapped = target.observe_all(tokens, caches, taps)
        for place, (length, most) in enumerate(zip(lengths, wanted, strict=True)):
            if most > 1 and length > start:
                own = (place, slice(max(0, length - start)))
                chunk = Features(hidden[own], None, tuple(x[own] for x in tapped))
                before = features[place]
                features[place] = chunk if before is None else before.then(chunk, most)
        mx.eval([(one.states, one.taps) for one in features if one is not None])
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()
    return features


def _chunks(
    texts: Sequence[BatchedText], longest: int
) -> Iterator[tuple[int, Int[mx.array, "B T"]]]:
    """Yield where each chunk begins and its tokens; padding is any token."""
    size = texts[0].decoding.cache.prefill_step_size
    prompts = [text.prompt[:-1] for text in texts]
    tokens = mx.stack([mx.pad(prompt, (0, longest - prompt.size)) for prompt in prompts])
    for start in range(0, longest, size):
        yield start, tokens[:, start : start + size]
