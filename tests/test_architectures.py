"""Every architecture of mlx-lm as a tree verifier, against plain decoding; makes a table."""

import os
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import REPOSITORY
from mlx_lm.models.cache import CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache
from tiny_models import NOT_BUILT, TINY_CONFIGS, tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.target import Target
from mlx_distill.target.tree_cache import _tail, _temporal

TABLE = REPOSITORY / "docs" / "architectures.md"
PROMPT = [int(t) for t in np.random.default_rng(3).integers(1, 96, 24)]
# A root with two children, and a deep branch; siblings differ.
PARENTS = [0, 0, 0, 1, 1, 2, 3, 6, 7]
CHAIN = [0, 0, 1, 2, 3]
TOKENS = [11, 22, 33, 44, 55, 66, 77, 88, 9]


def plain_logits(model: Any, tokens: list[int]) -> tuple[mx.array, list[Any]]:
    """Return the logits after a text whose prompt is read at once and the rest token by token."""
    caches = make_prompt_cache(model)
    logits = model(mx.array([tokens[: len(PROMPT)]]), cache=caches)
    for token in tokens[len(PROMPT) :]:
        logits = model(mx.array([[token]]), cache=caches)
    mx.eval(logits)
    return logits[0, -1], caches


def leaves(caches: list[Any]) -> list[Any]:
    """Return the caches without the lists that some layers keep them in."""
    return [leaf for c in caches for leaf in (c.caches if isinstance(c, CacheList) else [c])]


def content(cache: Any) -> list[mx.array]:
    """Return what a cache holds, in the text's order; of a window, what the next token sees."""
    if isinstance(cache, RotatingKVCache):
        arrays = [_temporal(cache, x) for x in (cache.keys, cache.values)]
        return [_tail(x, cache.keep, cache.max_size - 1) for x in arrays]
    arrays = cache.keys_and_values()
    return [a for x in arrays for a in (x if isinstance(x, tuple | list) else [x])]


def assert_close(found: mx.array, expected: mx.array) -> None:
    """Compare with a tolerance of 1e-3 of the values' spread; -inf equals -inf."""
    a, b = np.array(found), np.array(expected)
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
    finite = np.isfinite(b)
    if not finite.any():  # some caches keep values of width zero
        return
    scale = max(float(b[finite].std()), 1e-6)
    np.testing.assert_allclose(a[finite], b[finite], atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tree_equals_plain_decoding(name: str) -> None:
    model = tiny_model(name)
    target = Target.of(model)
    if target.support == "none":
        assert target.reason
        return
    parents = CHAIN if target.support == "chain" else PARENTS
    tokens = TOKENS[: len(parents)]
    tree = PrefixTree.from_parents(mx.array(tokens), mx.array(parents), 5)
    paths = tree.paths()
    caches = make_prompt_cache(model)
    target.forward(mx.array(PROMPT), caches)

    call = target.verify(tree, caches)
    mx.eval(call.logits, call.hidden)
    for node, path in enumerate(paths):
        expected, _ = plain_logits(model, PROMPT + [tokens[i] for i in path])
        assert_close(call.logits[node], expected)

    # Two cycles: what the first commits, the second builds on; then a rewind by one token.
    path = paths[5 if target.support != "chain" else 3]
    call.commit(path)
    text = PROMPT + [tokens[i] for i in path]
    call = target.verify(tree, caches)
    for node, path in enumerate(paths):
        expected, _ = plain_logits(model, text + [tokens[i] for i in path])
        assert_close(call.logits[node], expected)
    path = paths[-1]
    call.commit(path)
    call.rewind(len(path) - 1)
    text += [tokens[i] for i in path[:-1]]
    _, expected_caches = plain_logits(model, text)
    for cache, other in zip(leaves(caches), leaves(expected_caches), strict=True):
        assert cache.offset == other.offset
        for found, wanted in zip(content(cache), content(other), strict=True):
            if not wanted.any().item():  # an indexer uses no values, it only has room for them
                continue
            if isinstance(other, ChunkedKVCache):  # drops the chunk before when it likes to
                size = min(found.shape[2], wanted.shape[2])
                found, wanted = found[:, :, -size:], wanted[:, :, -size:]
            assert found.shape == wanted.shape
            assert_close(found, wanted)
    logits, _ = target.forward(mx.array([7]), caches)
    assert_close(logits[0], plain_logits(model, [*text, 7])[0])


def test_table_of_architectures() -> None:
    """The docs list what was found; MLX_DISTILL_WRITE_DOCS=1 writes the list anew."""
    rows = []
    for name in sorted(TINY_CONFIGS, key=str.lower):
        target = Target.of(tiny_model(name))
        support = {"row": "tree", "batch": "tree (nodes on the batch axis)", "chain": "chain"}
        rows.append(f"| {name} | {support.get(target.support, 'refused')} | {target.reason} |")
    rows += [f"| {n} | not tested | {reason} |" for n, reason in sorted(NOT_BUILT.items())]
    text = TABLE_HEAD + "\n".join(rows) + "\n"
    if os.environ.get("MLX_DISTILL_WRITE_DOCS"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text


TABLE_HEAD = """# What every architecture supports
Written by `tests/test_architectures.py` from tiny random models of every architecture in mlx-lm.
*Tree*: the logits of all nodes of a tree equal those of plain decoding along each path, and so does
the cache after the commit. *Chain*: the same for a single drafted continuation; beams are cut to
the best one. *Refused*: `generate` says so in a sentence and decodes plainly with `--no-drafter`.

| architecture | drafting | why not trees |
|---|---|---|
"""
