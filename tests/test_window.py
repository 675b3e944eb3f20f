"""Sliding windows in the trees' layout: what plain decoding sees, no copies, and the way back."""

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.target import Target

TREE = PrefixTree.from_beams([[1, 2, 3], [1, 4, 5], [1, 6, 7]])


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.of(tiny_model("llama"))


def windows(target: Target, size: int, keep: int) -> list[RotatingKVCache]:
    return [RotatingKVCache(max_size=size, keep=keep) for _ in range(3)]


def wide_tree(num_nodes: int, random: np.random.Generator) -> PrefixTree:
    parents = [0, *(int(random.integers(0, node)) for node in range(1, num_nodes))]
    tokens = random.integers(1, 96, num_nodes).tolist()
    return PrefixTree.from_parents(mx.array(tokens), mx.array(parents), num_nodes)


def assert_close(found: mx.array, expected: mx.array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(("size", "keep"), [(8, 0), (16, 4), (300, 2)])
def test_any_order_of_calls_equals_plain_decoding(target: Target, size: int, keep: int) -> None:
    """Trees narrower and wider than the room, commits, rewinds, tokens and chunks in between."""
    random = np.random.default_rng(size)
    caches, plain = windows(target, size, keep), windows(target, size, keep)

    def plainly(tokens: list[int]) -> mx.array:
        return mx.stack([target.forward(mx.array([t]), plain)[0][0] for t in tokens])

    for _ in range(7):
        kind = random.integers(0, 4)
        if kind == 0:
            tokens = random.integers(1, 96, int(random.integers(1, 4))).tolist()
            logits, _ = target.forward(mx.array(tokens), caches)
            assert_close(logits, plainly(tokens))
            continue
        tree = wide_tree(60 if kind == 1 else 7, random)
        path = tree.paths()[int(random.integers(0, tree.tokens.size))]
        call = target.verify(tree, caches)
        call.commit(path)
        kept = len(path) if kind < 3 else int(random.integers(0, len(path) + 1))
        call.rewind(kept)
        if kept:
            tokens = [int(tree.tokens[node].item()) for node in path[:kept]]
            assert_close(call.logits[mx.array(path[:kept])], plainly(tokens))
        assert [cache.offset for cache in caches] == [cache.offset for cache in plain]
    assert_close(target.forward(mx.array([9]), caches)[0], plainly([9]))
    assert type(caches[0]) is RotatingKVCache
    assert caches[0].keys.shape[2] <= size


def filled(target: Target, size: int) -> list[RotatingKVCache]:
    caches = windows(target, size, 0)
    for cache in caches:
        keys = mx.random.normal((1, 2, size, 16))
        cache.update_and_fetch(keys, keys)
    mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.parametrize("path", [[0, 1], [0, 2]])
def test_a_cycle_does_not_copy_the_window(target: Target, path: list[int]) -> None:
    caches = filled(target, 100_000)
    window = 2 * caches[0].keys.nbytes
    tree = PrefixTree.from_beams([[1, 2], [1, 3]])
    mx.eval(tree.tokens, tree.mask, tree.depths)

    def cycle() -> None:
        call = target.verify(tree, caches)
        mx.eval(call.logits)
        call.commit(path)

    cycle()  # the first one lays the window out
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        cycle()
    # The rows of scores and masks are as long as the window.
    assert mx.get_peak_memory() - before < window // 2


def after_a_tree(target: Target) -> tuple[list[Any], mx.array]:
    """Return caches in the trees' layout, and the next token's logits by plain decoding."""
    caches, plain = windows(target, 8, 0), windows(target, 8, 0)
    target.forward(mx.arange(1, 20), caches)
    target.verify(TREE, caches).commit([0, 3, 4])
    for token in [*range(1, 20), 1, 4, 5]:
        target.forward(mx.array([token]), plain)
    return caches, target.forward(mx.array([7]), plain)[0]


def test_a_copy_of_a_cache_goes_its_own_way(target: Target) -> None:
    caches, expected = after_a_tree(target)
    other = copy.deepcopy(caches)
    target.verify(TREE, caches).commit([0, 1])
    assert_close(target.forward(mx.array([7]), other)[0], expected)


def test_a_cache_is_saved_in_the_layout_of_mlx_lm(target: Target, tmp_path: Path) -> None:
    caches, expected = after_a_tree(target)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(loaded[0]) is RotatingKVCache
    assert_close(target.forward(mx.array([7]), loaded)[0], expected)
    assert_close(target.forward(mx.array([7]), caches)[0], expected)


def test_a_cache_is_trimmed_while_it_can_be(target: Target) -> None:
    caches, plain = windows(target, 30, 0), windows(target, 30, 0)
    target.forward(mx.arange(1, 9), caches)
    target.verify(TREE, caches).commit([0, 3, 4])
    assert trim_prompt_cache(caches, 2) == 2
    expected = [target.forward(mx.array([t]), plain)[0] for t in [*range(1, 9), 1, 7]]
    assert_close(target.forward(mx.array([7]), caches)[0], expected[-1])
