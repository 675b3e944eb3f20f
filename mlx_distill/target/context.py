"""How long a text may be: what a model was made for, and what it can be given at all.

``context_length`` is what the configuration declares; beyond it a model still answers, only worse.
``position_limit`` is hard: a model that looks positions up in a learned table reads foreign memory
behind the table's last row, or ends the process.
"""

from collections.abc import Iterator, Mapping

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_distill.arrays import to_host
from mlx_distill.target.layer_cache import leaves
from mlx_distill.target.reading import read_whole
from mlx_distill.target.watching import Call, Heard, listening_once

# Names that model configurations use for the longest text a model was made for.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "max_context_length",
    "max_context_len",
    "model_max_length",
    "block_size",
)
# Tables of a configuration that describe the language model inside a larger one.
_TEXT_NAMES = ("text_config", "llm_config", "language_config", "text")
_ROPE_NAMES = ("rope_scaling", "rope_parameters")
# Rotary scalings whose declared limit may be the length before the stretch. The others declare
# the stretched one: Llama 3.2 says 131,072, though its factor is 32 and its original length 8,192.
_STRETCHING = ("yarn", "linear", "dynamic", "ntk")


def context_length(model: nn.Module) -> int | None:
    """Return the longest text a model was made for, in tokens, or None if it does not say.

    Where rotary positions are stretched, this is the larger of the declared limit and of the
    stretched one: ``factor`` times ``original_max_position_embeddings``. A model of states alone,
    without attention, has no positions; what mlx-lm's class of its configuration fills in counts
    for nothing there (2,056 for Mamba 2).
    """
    if _has_states_alone(model):
        return None
    for config in _configurations(model):
        declared = next((n for name in _CONTEXT_NAMES if (n := _size(config.get(name)))), None)
        if declared:
            return max([declared, *_stretched(config, declared)])
    return None


def position_limit(model: nn.Module) -> int | None:
    """Return how many positions a model has a learned row for; None where it computes them.

    Found in the model itself: it is a table that is asked for consecutive rows whatever the tokens
    are. A model with one table only, that of its tokens, is not run for this.
    """
    tables = [part for _, part in model.named_modules() if _is_table(part)]
    if len(tables) < 2:
        return None
    first: dict[int, int] = {}

    def look(table: nn.Module) -> Heard:
        def around(call: Call, ids: mx.array) -> mx.array:
            steps = ids.reshape(-1)
            if steps.size == 4 and mx.array_equal(steps - steps[0], mx.arange(4)).item():
                first[id(table)] = to_host(steps)[0]
            return call(ids)

        return Heard(table, around)

    with listening_once(look(table) for table in tables):
        read_whole(model, mx.array([[3, 1, 2, 1]]))
    rows = [table["weight"].shape[0] - first[id(table)] for table in tables if id(table) in first]
    return min(rows, default=None)


def text_limit(*models: nn.Module) -> int | None:
    """Return how many tokens a text may have that all models read; None if nothing says."""
    limits = [limit for one in models for limit in (context_length(one), position_limit(one))]
    return min((limit for limit in limits if limit is not None), default=None)


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def _has_states_alone(model: nn.Module) -> bool:
    if not hasattr(model, "make_cache"):
        return False
    caches = list(leaves(make_prompt_cache(model)))
    return bool(caches) and all(isinstance(cache, ArraysCache) for cache in caches)


def _configurations(model: nn.Module) -> Iterator[Mapping[str, object]]:
    """Yield a model's configurations as mappings, its own first, then those of its text model."""
    for part in (model, *model.children().values()):
        for name in ("args", "config"):
            config = _mapping(getattr(part, name, None))
            yield config
            yield from (_mapping(config.get(name)) for name in _TEXT_NAMES)


def _mapping(config: object) -> Mapping[str, object]:
    if isinstance(config, Mapping):
        return config
    return vars(config) if hasattr(config, "__dict__") else {}


def _stretched(config: Mapping[str, object], declared: int) -> Iterator[int]:
    """Yield how long texts may be with each rotary scaling of a configuration."""
    for name in _ROPE_NAMES:
        table = _mapping(config.get(name))
        # Kinds of layers may have scalings of their own.
        for scaling in (table, *(_mapping(value) for value in table.values())):
            kind = scaling.get("rope_type", scaling.get("type"))
            factor = scaling.get("factor")
            original = _size(scaling.get("original_max_position_embeddings")) or declared
            if not isinstance(kind, str) or not isinstance(factor, int | float):
                continue
            if any(word in kind for word in _STRETCHING) and 1 < factor < 1e6:
                yield int(original * factor)


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
