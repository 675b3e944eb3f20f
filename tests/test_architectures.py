"""Every architecture of mlx-lm as a tree verifier, against plain decoding; makes a table."""

import copy
import functools
import os
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import REPOSITORY
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING
from tiny_models import NOT_BUILT, TINY_CONFIGS, tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.target import Target
from mlx_distill.target.window import tail, temporal

TABLE = REPOSITORY / "docs" / "architectures.md"
# Everything that sets in at some length of the text sets in at 40 tokens: inside the first prompt's
# trees, and long before the second one's end. The look at opening is far below that.
THRESHOLD, PROMPTS = 40, (38, 90)
TEXT = [int(t) for t in np.random.default_rng(3).integers(1, 96, 90)]
# A root with two children, and a deep branch; siblings differ.
PARENTS = [0, 0, 0, 1, 1, 2, 3, 6, 7]
CHAIN = [0, 0, 1, 2, 3]
TOKENS = [11, 22, 33, 44, 55, 66, 77, 88, 9]


@functools.cache
def model_of(name: str) -> Any:
    """Return a model for all tests: it is built and opened once."""
    return tiny_model(name, threshold=THRESHOLD)


@dataclass
class Plain:
    """A text that plain decoding has read: the logits behind it, and its caches."""

    model: Any
    logits: mx.array
    caches: list[Any]

    @classmethod
    def read(cls, model: Any, prompt: list[int]) -> "Plain":
        caches = make_prompt_cache(model)
        logits = model(mx.array([prompt]), cache=caches)[0, -1]
        mx.eval(logits)
        return cls(model, logits, caches)

    def then(self, token: int) -> "Plain":
        """Return the text with one more token; this one stays as it is."""
        caches = copy.deepcopy(self.caches)
        logits = self.model(mx.array([[token]]), cache=caches)[0, -1]
        mx.eval(logits)
        return Plain(self.model, logits, caches)

    def nodes(self, parents: list[int]) -> list["Plain"]:
        """Return the text that ends with each node of a tree."""
        grown = [self.then(TOKENS[0])]
        for node, parent in enumerate(parents[1:], start=1):
            grown.append(grown[parent].then(TOKENS[node]))
        return grown


def leaves(caches: list[Any]) -> list[Any]:
    """Return the caches without the lists that some layers keep them in."""
    return [leaf for c in caches for leaf in (c.caches if isinstance(c, CacheList) else [c])]


def content(cache: Any) -> list[mx.array]:
    """Return what a cache holds, in the text's order; of a window, what the next token sees."""
    if isinstance(cache, RotatingKVCache):
        arrays = [temporal(cache, x) for x in (cache.keys, cache.values)]
        return [tail(x, cache.keep, cache.max_size - 1) for x in arrays]
    if not hasattr(cache, "keys_and_values"):  # recurrent states
        return [x for _, x in tree_flatten(cache.state) if isinstance(x, mx.array)]
    arrays = cache.keys_and_values()
    return [a for x in arrays for a in (x if isinstance(x, tuple | list) else [x])]


def assert_close(found: mx.array, expected: mx.array) -> None:
    """Compare within 1e-4 of the values' spread; -inf equals -inf."""
    a, b = np.array(found), np.array(expected)
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
    finite = np.isfinite(b)
    if not finite.any():  # some caches keep values of width zero
        return
    scale = max(float(b[finite].std()), 1e-6)
    np.testing.assert_allclose(a[finite], b[finite], atol=1e-4 * scale, rtol=1e-4)


def assert_same_caches(found: list[Any], expected: list[Any]) -> None:
    for cache, other in zip(leaves(found), leaves(expected), strict=True):
        assert getattr(cache, "offset", 0) == getattr(other, "offset", 0)
        for ours, wanted in zip(content(cache), content(other), strict=True):
            if not wanted.any().item():  # an indexer uses no values, it only has room for them
                continue
            if isinstance(other, ChunkedKVCache):  # drops the chunk before when it likes to
                size = min(ours.shape[2], wanted.shape[2])
                ours, wanted = ours[:, :, -size:], wanted[:, :, -size:]
            assert ours.shape == wanted.shape
            assert_close(ours, wanted)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tree_equals_plain_decoding(name: str) -> None:
    model = model_of(name)
    target = Target.of(model)
    if target.support == "none":
        assert target.reason
        return
    chain = target.support == "chain"
    parents = CHAIN if chain else PARENTS
    tokens = mx.array(TOKENS[: len(parents)])
    tree = PrefixTree.from_parents(tokens, mx.array(parents), 5)
    paths = tree.paths()
    # What the first cycle commits, the second builds on; the second takes its last token back.
    cycles = [3, 4] if chain else [5, 8]
    for prompt in PROMPTS:
        text = Plain.read(model, TEXT[:prompt])
        caches = make_prompt_cache(model)
        target.forward(mx.array(TEXT[:prompt]), caches)
        for node in cycles if prompt < THRESHOLD else cycles[1:]:
            call = target.verify(tree, caches)
            mx.eval(call.logits, call.hidden)
            grown = text.nodes(parents)
            for logits, one in zip(call.logits, grown, strict=True):
                assert_close(logits, one.logits)
            call.commit(paths[node])
            text = grown[node]
        call.rewind(len(paths[node]) - 1)
        text = grown[parents[node]]
        assert_same_caches(caches, text.caches)
        logits, _ = target.forward(mx.array([7]), caches)
        assert_close(logits[0], text.then(7).logits)


def test_table_of_architectures() -> None:
    """The docs list what was found; MLX_DISTILL_WRITE_DOCS=1 writes the list anew."""
    rows = []
    for name in sorted(TINY_CONFIGS, key=str.lower):
        target = Target.of(model_of(name))
        support = {"row": "tree", "batch": "tree (nodes on the batch axis)", "chain": "chain"}
        support["copies"] = "tree (on copies)"
        rows.append(f"| {name} | {support.get(target.support, 'refused')} | {target.reason} |")
    rows += [
        f"| {name} | as {other} |  |"
        for name, other in sorted(MODEL_REMAPPING.items())
        if name not in TINY_CONFIGS
    ]
    rows += [f"| {n} | not tested | {reason} |" for n, reason in sorted(NOT_BUILT.items())]
    text = TABLE_HEAD + "\n".join(rows) + "\n"
    if os.environ.get("MLX_DISTILL_WRITE_DOCS"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text


TABLE_HEAD = """# What every architecture supports
Written by `tests/test_architectures.py` from tiny random models of every architecture in mlx-lm.
*Tree*: the logits of all nodes of a tree equal those of plain decoding along each path, and so does
the cache after the commit; recurrent and hybrid models among them, whose states are remade of the
accepted nodes. *On copies*: neither the attention nor the cache can take a tree, so every path is a
row of a batch that copies of the cache read. That is exact, and dear behind long texts; a single
continuation is read by the cache itself, and is what planned drafts are there. States that cannot
go back are put back, and what is kept is read again. *Chain*, which none of these needs: a single
drafted continuation is all that a model can verify, and beams are cut to the best one.
*Refused*: `generate` says so in a sentence and decodes plainly with `--no-drafter`. *As*: mlx-lm
builds models of that type with another one's classes.

| architecture | drafting | why not trees |
|---|---|---|
"""
