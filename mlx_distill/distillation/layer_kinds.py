"""What kind of layer a layer is, and the configurations that may keep it when others go.

An architecture may tell a layer's kind by its number: every third is global, the first is dense.
Fields of a configuration that do so have many names, so they are not known here. Instead, values
are proposed for all that could, and a model built from them is compared with the teacher layer by
layer: parameters, settings, caches, and the masks that the layers are given.
"""

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlx_distill.arrays import to_number
from mlx_distill.compat import model_classes
from mlx_distill.errors import InputError
from mlx_distill.model_folder import LAYERS, OTHER_PARTS
from mlx_distill.target.layers import layer_list
from mlx_distill.target.watching import Heard, listening_once

# Names of fields that may say which of the layers are of some kind.
PLACES = re.compile(r"layers?|idxs?|ind(ex|ices)|blocks")
PERIODS = re.compile(
    r"pattern|interval|freq|replace|dense|step|shared|start|end|every|global|period|window_layers"
)
# Settings of layers that change with the number of layers; whether they matter shows in use.
PASSED_OVER = re.compile(
    r"(layer_)?(idx|id|index|number)|layer_i|(num|n)_(\w+_)?layers?|scale_depth|_training|_no_grad"
)
NEEDS_OTHERS = "the architecture needs layers of another kind beside them"
MOST_TRIED = 100
TOKENS = 37  # of a text to look at masks with; no width of a network


def structures(
    teacher: nn.Module, config: dict[str, Any], layers: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield configurations of a student of some layers, the likeliest first.

    Raises:
        InputError: If the configuration does not say how many layers there are.
    """
    count = len(layer_list(teacher)[1])
    full = _with_defaults(teacher, config, count)
    own = _chosen(full, count, layers)
    if "scale_depth" in own:  # MiniCPM divides it by the root of the number of layers
        own["scale_depth"] *= (len(layers) / count) ** 0.5
    if not any(_counts(path[-1]) for path, value in _fields(full) if value == count):
        raise InputError("the teacher's config says no number of layers")
    free = [
        (path, value)
        for path, value in _fields(own)
        if type(value) is int and PERIODS.search(path[-1]) and 0 <= value <= 4 * count
        if not _counts(path[-1]) and path[-1] in _known_fields(own, path)
    ]
    for variant in itertools.islice(_variants(own, free, len(layers)), MOST_TRIED):
        yield _without_defaults(variant, full, config)


def _variants(
    own: dict[str, Any], free: Sequence[tuple[Any, int]], most: int
) -> Iterator[dict[str, Any]]:
    """Yield a configuration as it is, then with other values of one of its fields, then of two."""
    yield own
    for size in (1, 2):
        for fields in itertools.combinations(free, size):
            others = [[v for v in range(most + 2) if v != value] for _, value in fields]
            for values in itertools.product(*others):
                variant = copy.deepcopy(own)
                for (path, _), value in zip(fields, values, strict=True):
                    _set(variant, path, value)
                yield variant


def different_kind(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> str | None:
    """Return what a student's layers are not that the teacher's are, None if there is nothing.

    Args:
        teacher: Has all layers.
        student: Has as many as are chosen.
        layers: Which of the teacher's.
    """
    theirs, ours = layer_list(teacher)[1], layer_list(student)[1]
    if len(ours) != len(layers):
        return f"it would have {len(ours)} layers"
    for number, layer in zip(layers, ours, strict=True):
        if name := _difference(_settings(theirs[number]), _settings(layer)):
            return f"layer {number} would have another {name}"
    try:
        given, known = _surroundings(student), _surroundings(teacher)
    except Exception:  # an architecture may look for the first of its global layers
        return NEEDS_OTHERS
    for number, here, there in zip(layers, given, (known[i] for i in layers), strict=True):
        if not _same(here.given, there.given) or (
            here.cache and there.cache and here.cache != there.cache
        ):
            return f"layer {number} would have another window or cache"
    return None


def different_result(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> int | None:
    """Return which of the teacher's layers computes something else in the student, if any does.

    An architecture may scale what a layer does by its number, or by how many there are. So every
    layer of the student is called beside the teacher's, on what the student gives it.
    """
    theirs, results = layer_list(teacher)[1], {}

    def beside(number: int) -> Any:
        def around(call: Any, *args: Any, **options: Any) -> Any:
            caches = [value for value in [*args, *options.values()] if hasattr(value, "empty")]
            if not all(cache.empty() for cache in caches):  # it reads what another layer wrote
                return call(*args, **options)
            # The caches are written by a call: each of the two gets its own.
            others, other_options = copy.deepcopy((args, options))
            expected = theirs[number](*others, **other_options)
            found = call(*args, **options)
            results[number] = found, expected
            return found

        return around

    pairs = zip(layers, layer_list(student)[1], strict=True)
    with listening_once([Heard(layer, beside(number)) for number, layer in pairs]):
        logits = student(mx.arange(TOKENS)[None], cache=make_prompt_cache(student))
    mx.eval(logits)
    for number, (found, expected) in results.items():
        if not _close(found, expected):
            return number
    return None


def _close(found: Any, expected: Any) -> bool:
    """Return whether two results hold the same numbers, up to rounding."""
    for (_, one), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True):  # pyright: ignore
        if isinstance(one, mx.array) and isinstance(other, mx.array):
            one, other = (mx.nan_to_num(x.astype(mx.float32)) for x in (one, other))
            size, far = mx.abs(other).max(), mx.abs(one - other).max()
            if not to_number(far <= 1e-2 * size + 1e-6):
                return False
    return True


def _with_defaults(teacher: nn.Module, config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a configuration with those of its fields that are left out and tell layers apart."""
    full = copy.deepcopy(config)
    for part in [full, *(v for v in full.values() if isinstance(v, dict))]:
        known = getattr(teacher, "args", None) if part is full else None
        for field in _arguments(part):
            value = field.default
            if isinstance(made := getattr(known, field.name, None), list) and len(made) == count:
                value = made
            counted = value == count and _counts(field.name)
            period = type(value) is int and PERIODS.search(field.name)
            if part.get(field.name) is None and (isinstance(value, list) or counted or period):
                part[field.name] = copy.deepcopy(value)
    return full


def _without_defaults(
    config: dict[str, Any], full: dict[str, Any], said: dict[str, Any]
) -> dict[str, Any]:
    """Return a configuration without the fields that were left out before and are as they were."""
    kept = {}
    for name, value in config.items():
        if isinstance(value, dict) and isinstance(said.get(name), dict):
            kept[name] = _without_defaults(value, full[name], said[name])
        elif name in said or value != full[name]:
            kept[name] = value
    return kept


def _arguments(part: dict[str, Any]) -> tuple[dataclasses.Field[Any], ...]:
    """Return what mlx-lm's class for a configuration, or a part of one, reads of it."""
    try:
        kind = model_classes(part)[1]
    except Exception:  # a part of no kind, or another one than the one that reads text
        return ()
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _known_fields(config: dict[str, Any], path: Sequence[str]) -> set[str]:
    """Return the fields that are read beside one, that one itself where nobody knows."""
    part = config
    for name in path[:-1]:
        part = part[name]
    return {field.name for field in _arguments(part)} or {path[-1]}


def _chosen(value: Any, count: int, layers: Sequence[int], name: str = "") -> Any:
    """Return a configuration's value for some of the layers, as far as its form says how."""
    if isinstance(value, dict):
        return {
            key: part if OTHER_PARTS.search(key) else _chosen(part, count, layers, key)
            for key, part in value.items()
        }
    if type(value) is int and value == count and _counts(name):
        return len(layers)
    if "token" in name or not isinstance(value, list | str):
        return value  # several end tokens may be as many as there are layers
    if isinstance(value, str):
        if "pattern" not in name or not value:
            return value
        return "".join(value[layer % len(value)] for layer in layers)
    if len(value) == count:
        return [value[layer] for layer in layers]
    if PLACES.search(name) and all(type(v) is int and 0 <= v < count for v in value):
        return [new for new, layer in enumerate(layers) if layer in value]
    return value


def _counts(name: str) -> bool:
    """Return whether a field says how many layers there are, and not how many of some kind."""
    return bool(LAYERS.fullmatch(name)) and not PERIODS.search(name)


def _fields(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield the values of a configuration and of its parts that read text, with their paths."""
    for name, value in config.items():
        if isinstance(value, dict) and not OTHER_PARTS.search(name):
            yield from _fields(value, (*path, name))
        else:
            yield (*path, name), value


def _set(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        config = config[name]
    config[path[-1]] = value


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Return all that a layer computes with, the values of its parameters aside."""
    parameters = {name: x.shape for name, x in tree_flatten(layer.parameters())}  # pyright: ignore
    found: dict[str, Any] = {"parameters": parameters}
    for path, module in layer.named_modules():
        found[f"{path} type"] = type(module).__name__
        for name, value in {**vars(module), **module}.items():
            plain = value is None or isinstance(value, bool | int | float | str | tuple)
            hidden = isinstance(value, mx.array) and name.startswith("_")
            if (plain or hidden) and not PASSED_OVER.fullmatch(name):
                found[f"{path}.{name}".strip(".")] = value
    return found


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Return the name of the first setting that two layers do not share."""
    for name in [*theirs, *ours]:
        if {type(theirs.get(name, 0)), type(ours.get(name, 0))} == {type(None), mx.array}:
            continue  # one of them was in use already, and keeps what it computed
        if name not in theirs or name not in ours or not _same(theirs[name], ours[name]):
            return name
    return None


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; arrays may be among them."""
    if isinstance(one, mx.array) and isinstance(other, mx.array):
        return one.shape == other.shape and bool(to_number(mx.array_equal(one, other)))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


class _Place(NamedTuple):
    """What a layer is given beside the text: its masks, and what its cache is."""

    cache: tuple[Any, ...]
    given: list[Any]


def _surroundings(network: nn.Module) -> list[_Place]:
    """Return where each layer of a network stands; caches are known if every layer has one."""
    stack = layer_list(network)[1]
    caches = make_prompt_cache(network)
    known = [_kind(cache) for cache in caches] if len(caches) == len(stack) else [()] * len(stack)
    given: list[Any] = [[] for _ in stack]

    def note(number: int) -> Any:
        def around(call: Any, *args: Any, **options: Any) -> Any:
            given[number] += [
                value
                for value in [*args, *options.values()]
                if isinstance(value, str)
                or (isinstance(value, mx.array) and value.shape[-2:] == (TOKENS, TOKENS))
            ]
            return call(*args, **options)

        return around

    with listening_once(Heard(layer, note(i)) for i, layer in enumerate(stack)):
        network(mx.arange(TOKENS)[None], cache=caches)
    return list(map(_Place, known, given))


def _kind(cache: Any) -> tuple[Any, ...]:
    """Return a cache's type and what it holds at most."""
    if isinstance(cache, CacheList):
        return tuple(_kind(part) for part in cache.caches)
    return type(cache).__name__, getattr(cache, "max_size", None), getattr(cache, "keep", None)
