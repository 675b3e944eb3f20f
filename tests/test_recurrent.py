"""Recurrent states under trees and lines: logits, commits, rewinds; what is wrong is refused."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.bailing_moe_linear import recurrent_gla
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from mlx_lm.models.gated_delta import gated_delta_update
from mlx_lm.models.ssm import ssm_update
from tiny_models import tiny_model

from mlx_distill.benchmarking.dispatches import as_sent_to_a_gpu
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError
from mlx_distill.target.layer_cache import leaves
from mlx_distill.target.recurrent.apart import SCANS, ApartCall
from mlx_distill.target.recurrent.rows import RowsCall
from mlx_distill.target.target import Target
from mlx_distill.target.tree_layout import TreeLayout

pytestmark = pytest.mark.usefixtures("not_compiled")  # so many kinds fuse a hundred

# Mixers that are taken apart, by each scan and by convolutions alone; mixers in rows; beside keys.
MIXERS = ["mamba2", "qwen3_5", "kimi_linear", "bailing_hybrid", "lfm2", "falcon_h1"]
MIXERS += ["jamba", "rwkv7", "longcat_flash_ngram"]
TEXT = [5, 17, 42, 8, 23, 61, 9]
PARENTS = mx.array([0, 0, 0, 1, 1, 2, 3])
TOKENS = [[11, 22, 33, 44, 55, 66, 77], [3, 1, 4, 15, 9, 2, 6], [27, 18, 28, 45, 90, 45, 23]]


def tree_of(tokens: list[int]) -> PrefixTree:
    """Return a tree whose nodes are no deeper than is said of them."""
    return PrefixTree.from_parents(mx.array(tokens), PARENTS, 5)


def line_of(tokens: list[int]) -> PrefixTree:
    return PrefixTree.chain(mx.array(tokens[:4]))


# A shape, the path that is committed, and how much of it is kept then.
CYCLES: list[tuple[Callable[[list[int]], PrefixTree], list[int], int]] = [
    (tree_of, [0, 2, 5], 3),
    (line_of, [0, 1, 2, 3], 4),
    (line_of, [0], 1),
    (tree_of, [0], 1),
    (tree_of, [0, 1, 3, 6], 2),
    (line_of, [0, 1, 2], 2),
    (lambda tokens: PrefixTree.root(mx.array(tokens[:1])), [0], 1),
    (line_of, [0, 1, 2, 3], 3),
    (line_of, [0, 1], 0),
]


def assert_close(found: mx.array, expected: mx.array) -> None:
    """Compare within 1e-4 of the values' spread."""
    limit = 1e-4 * max(float(mx.std(expected.astype(mx.float32)).item()), 1e-3)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=limit)


def states(caches: list[Any]) -> list[mx.array]:
    """Return the recurrent states; keys and values show in the next cycle's logits."""
    kept = (cache.cache for cache in leaves(caches) if isinstance(cache, ArraysCache))
    return [x for arrays in kept for x in arrays if x is not None]


@pytest.mark.parametrize("name", MIXERS)
def test_cycles_of_trees_and_lines(name: str) -> None:
    target = Target.of(tiny_model(name))
    assert (target.support, target.reason) == ("row", "")

    def read(text: list[int]) -> tuple[mx.array, list[Any]]:
        caches = make_prompt_cache(target.model)
        return target.forward(mx.array(text), caches)[0], caches

    text, caches = list(TEXT), read(TEXT)[1]
    for number, (shape, path, kept) in enumerate(CYCLES):
        tokens = TOKENS[number % 3]
        tree = shape(tokens)
        call = target.verify(tree, caches)
        paths = tree.paths()
        for leaf in (one for one in paths if not any(one == other[:-1] for other in paths)):
            expected = read([*text, *(tokens[node] for node in leaf)])[0][len(text) :]
            assert_close(call.logits[mx.array(leaf)], expected)
        call.commit(path)
        if kept < len(path):
            call.rewind(kept)
        text += [tokens[node] for node in path[:kept]]
        for found, expected in zip(states(caches), states(read(text)[1]), strict=True):
            assert found.dtype == expected.dtype
            assert_close(found, expected)


@functools.cache
def arguments_of(scan: str, state: bool) -> dict[str, Any]:
    """Return arguments for a scan of seven tokens."""
    mx.random.seed(4)

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape)

    if scan == "ssm_update":
        given = {"hidden_states": normal(1, 7, 4, 6), "A_log": normal(4), "D": normal(4)}
        given |= {"B": normal(1, 7, 2, 8), "C": normal(1, 7, 2, 8), "dt_bias": normal(4)}
        given |= {"dt": normal(1, 7, 4), "time_step_limit": (0.0, 100.0)}
        return given | {"state": normal(1, 4, 6, 8) if state else None}
    if scan == "recurrent_gla":
        given = {name: normal(1, 4, 7, 6) for name in "qkv"}
        given |= {"g": -mx.abs(normal(4)), "scale": 0.4}
        return given | {"h": normal(1, 4, 6, 6) if state else None}
    keys = normal(1, 7, 2, 8)
    given = {"q": normal(1, 7, 2, 8), "k": keys / mx.linalg.norm(keys, axis=-1, keepdims=True)}
    given |= {"v": normal(1, 7, 4, 6), "b": normal(1, 7, 4), "dt_bias": normal(4)}
    given |= {"a": normal(1, 7, 4), "A_log": normal(4)}
    return given | {"state": normal(1, 4, 6, 8) if state else None}


VECTOR = {
    "a": mx.random.normal((1, 7, 4, 8)),
    "A_log": mx.zeros((4, 1)),
    "dt_bias": mx.ones((4, 8)),
}
# Of the third token, nothing before is left.
SHUT = mx.where(mx.arange(7)[None, :, None] == 2, 1e4, 0.5) * mx.ones((1, 7, 4))
SCANNED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (gated_delta_update, {}),
    (gated_delta_update, {"allow_neg_eigval": True, "a": SHUT}),
    (gated_delta_update, VECTOR),
    (gated_delta_update, {**VECTOR, "lower_bound": -5.0}),
    (ssm_update, {}),
    (recurrent_gla, {}),
]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("own", "changes"), SCANNED)
def test_scans_along_the_ancestors(own: Callable[..., Any], changes: Any, state: bool) -> None:
    scan = SCANS[own.__name__]
    given = arguments_of(scan.name, state) | changes
    tree = tree_of(TOKENS[0])
    layout = TreeLayout(tree.mask, tree.depths, 3, False, tree.max_depth)
    found, state_at = scan.on_tree(layout, **given)
    for node, path in enumerate(tree.paths()):
        rows = {name: mx.take(given[name], mx.array(path), axis=scan.axis) for name in scan.rows}
        expected, after = own(**{**given, **rows})
        place = (slice(None),) * scan.axis
        assert_close(found[(*place, node)], expected[(*place, -1)])
        assert_close(state_at(node), after)


def as_a_line(self: ApartCall, scan: object, own: Any, arguments: dict[str, Any]) -> Any:
    return own(**arguments)


def replayed_short(kind: Any) -> Callable[..., None]:
    replay = kind.replay
    return lambda self, paths, states: replay(self, [paths[0][:-1]], states)


# Every node is taken for a successor of the one before it, or a commit forgets the last node.
FAULTS = [
    ("mamba2", ApartCall, "scan", as_a_line),
    ("qwen3_5", ApartCall, "scan", as_a_line),
    ("lfm2", TreeLayout, "windows", lambda self, n: mx.arange(7)[:, None] + mx.arange(n)),
    ("rwkv7", TreeLayout, "paths", mx.zeros((7, 4), mx.int32) + mx.arange(4)),
    ("kimi_linear", ApartCall, "replay", replayed_short(ApartCall)),
    ("jamba", RowsCall, "replay", replayed_short(RowsCall)),
]


@pytest.mark.parametrize(("name", "owner", "attribute", "wrong"), FAULTS)
def test_a_fault_is_found_when_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: type, attribute: str, wrong: object
) -> None:
    monkeypatch.setattr(owner, attribute, wrong)
    assert Target.of(tiny_model(name)).support in ("copies", "chain")


def test_a_padded_state_is_refused() -> None:
    target = Target.of(tiny_model("lfm2"))
    caches = make_prompt_cache(target.model)
    target.check_caches(caches)
    next(cache for cache in caches if isinstance(cache, ArraysCache)).left_padding = mx.array([2])
    with pytest.raises(InputError, match=r"ArraysCache.* cannot hold the drafts"):
        target.check_caches(caches)


def test_a_tree_costs_a_gpu_no_more_than_a_line() -> None:
    """Of Mamba-2, whose scan mlx-lm writes out for several tokens; a commit is next to nothing."""
    model = tiny_model("mamba2")
    target, caches = Target.of(model), make_prompt_cache(model)
    mx.eval(target.forward(mx.array(TEXT), caches), states(caches))
    tree = tree_of(TOKENS[0])
    mx.eval(tree.tokens, tree.mask, tree.depths)

    def sent_for(compute: Callable[[], Any]) -> int:
        with as_sent_to_a_gpu() as sent:
            sent.add(compute())
        return sum(sent.count().values())

    other = make_prompt_cache(model)
    mx.eval(model(mx.array([TEXT]), cache=other), states(other))
    line = sent_for(lambda: model(tree.tokens[None], cache=other))
    calls = []
    assert sent_for(lambda: calls.append(target.verify(tree, caches)) or calls[0].logits) <= line
    assert sent_for(lambda: calls[0].commit([0, 1, 3]) or states(caches)) <= 6 * len(caches)


def fits(part: nn.Module) -> bool:
    return hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mamba2", mx.float16), ("qwen3_5", mx.bfloat16), ("lfm2", mx.bfloat16), ("plamo2", 4)],
)
def test_half_precision_and_quantised_weights(name: str, kind: object) -> None:
    model = tiny_model(name)
    if kind == 4:
        nn.quantize(model, 32, 4, class_predicate=lambda _, part: fits(part))
    model.set_dtype(kind if isinstance(kind, mx.Dtype) else mx.bfloat16)
    target = Target.of(model)
    assert target.support == "row"
    caches, plain = make_prompt_cache(model), make_prompt_cache(model)
    target.forward(mx.array(TEXT), caches)
    target.verify(tree_of(TOKENS[0]), caches).commit([0, 2])
    target.forward(mx.array([*TEXT, TOKENS[0][0], TOKENS[0][2]]), plain)
    kinds = [[x.dtype for x in states(kept)] for kept in (caches, plain)]
    assert kinds[0] == kinds[1]
