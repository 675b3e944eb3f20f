"""Kernels where they are used: a tree's call with all of them, executed by the harness."""

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from half_models import tiny_llama
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.kernels.choice import forced, performing
from mlx_distill.kernels.product_source import MOST_ROWS
from mlx_distill.kernels.products import few_rows
from mlx_distill.kernels.program import launching
from mlx_distill.kernels.tree_attention import tree_attention
from mlx_distill.target.joined_layers import NAMES
from mlx_distill.target.target import Target
from tests.kernels.harness import Harness, compile_what_is_launched, no_compiler

pytestmark = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())

TREE = PrefixTree.from_beams([[1, 2, 3, 9], [1, 4, 5], [1, 2, 7, 8], [1, 6]])


WIDTHS = {"hidden_size": 128, "intermediate_size": 64, "vocab_size": 96, "head_dim": 32}


@pytest.mark.parametrize(
    ("kind", "packed", "apart"),
    [("llama", False, ()), ("llama", True, ()), ("llama", True, NAMES), ("qwen3", False, ())],
)
def test_a_trees_call_with_kernels_says_what_it_says_without(
    kind: str, packed: bool, apart: Collection[str]
) -> None:
    model = tiny_llama(**WIDTHS) if kind == "llama" else tiny_model(kind, **WIDTHS)
    if packed:
        nn.quantize(model, group_size=32, bits=4)
    mx.eval(model.parameters())
    target, used = Target.of(model), set()

    def noting(operation: Any, *args: Any, **options: Any) -> Any:
        used.add(operation.name)
        return operation.kernel(*args, **options)

    def verified() -> mx.array:
        with forced(but=apart), performing(noting):
            return target.verify(TREE, _read(model)).logits

    expected = target.verify(TREE, _read(model)).logits
    compile_what_is_launched(verified)
    with launching(Harness(seed=3)):
        found = verified()
        mx.eval(found)
    assert used == {"few_rows", "tree_attention", *({"tree_rope"} if apart else NAMES)}
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "affine", "mxfp4"])
def test_a_product_does_not_depend_on_how_many_rows_there_are(kind: str) -> None:
    harness = Harness(seed=5)
    cases = (case for case in few_rows.cases(2) if case.args[0].dtype == mx.float16)
    chosen = (case for case in cases if _kind(case.args) == kind and case.args[0].shape[0] > 9)
    x, *rest = next(chosen).args

    def products(*rows: int) -> list[mx.array]:
        return [few_rows.kernel(x[row : row + 1], *rest) for row in rows]

    compile_what_is_launched(lambda: (few_rows.kernel(x[:MOST_ROWS], *rest), products(0)))
    rows = (0, 7, x.shape[0] - 1)
    with launching(harness):
        whole = few_rows.kernel(x[:MOST_ROWS], *rest)
        for row, alone in zip(rows, products(*rows), strict=True):
            assert mx.array_equal(whole[row], alone[0], equal_nan=True).item()


def test_attention_does_not_depend_on_which_nodes_there_are() -> None:
    """A chain of nodes attends as each of them does when those before it are cached."""
    mx.random.seed(2)
    q, k, v = (mx.random.normal((1, heads, 262, 32)) for heads in (4, 2, 2))
    nodes, past = 4, 254  # the last ones are in the next part
    mask = mx.tril(mx.ones((nodes, past + nodes), mx.bool_), past)
    inside = mask[:, past:]
    chain = q[..., past : past + nodes, :]

    def attended() -> list[mx.array]:
        """Return what all of them see, and each alone."""
        args = k[..., : past + nodes, :], v[..., : past + nodes, :], mask, inside, 0.2
        found = [tree_attention.kernel(chain, *args)]
        for node in range(nodes):
            end = past + node + 1
            seen = k[..., :end, :], v[..., :end, :], mask[:1, :end], inside[:1, :1], 0.2
            found.append(tree_attention.kernel(chain[..., node : node + 1, :], *seen))
        return found

    compile_what_is_launched(attended)
    with launching(Harness(seed=4)):
        whole, *each = attended()
    for node, alone in enumerate(each):
        np.testing.assert_array_equal(whole[..., node : node + 1, :], alone)


def _kind(args: tuple[Any, ...]) -> str:
    return "dense" if args[3] is None else args[3].mode


def _read(model: nn.Module) -> list[Any]:
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[5, 9, 33, 2]]), cache=caches))
    return caches
