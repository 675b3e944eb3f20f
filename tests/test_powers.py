"""Exponentials as powers of two: the same attention and gates, and only where they are meant."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from half_models import tiny_llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree, ancestors
from mlx_distill.kernels import exponentials
from mlx_distill.target import powers
from mlx_distill.target.exact import ExactTarget
from mlx_distill.target.target import Target
from mlx_distill.target.watching import Heard, hearing, watch

TEXT = mx.array([5, 9, 33, 2, 7, 11, 5])
TREE = PrefixTree.from_beams([[1, 2, 3, 9], [1, 4, 5], [1, 2, 7, 8], [1, 6]])


@pytest.fixture
def by_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used, whatever a probe would find, and for the smallest attention."""
    monkeypatch.setattr(exponentials, "by_powers", lambda: True)
    monkeypatch.setattr(powers, "LEAST_WEIGHTS", 0)


@pytest.mark.parametrize("size", [0.0, 1.0, 8.0, 100.0])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("past", [0, 1, 40, 257])
def test_attention_is_that_of_exponentials(size: float, heads: int, groups: int, past: int) -> None:
    random = np.random.default_rng(past)
    nodes, width = 8, 32
    total = past + nodes

    def normal(*shape: int) -> mx.array:
        return mx.array(random.normal(size=shape).astype(np.float32))

    queries = normal(1, nodes, heads, width).swapaxes(1, 2) * size
    # Keys lie in a longer buffer, as a cache's do.
    keys, values = (normal(1, groups, total + 9, width)[..., :total, :] for _ in range(2))
    inside = ancestors(mx.array([0, 0, 0, 1, 1, 3, 5, 2]), nodes)
    mask = mx.concatenate([mx.ones((nodes, past), mx.bool_), inside], axis=1)
    found = powers.attention(queries, keys, values, mask, width**-0.5)
    attend = mx.fast.scaled_dot_product_attention
    expected = attend(queries, keys, values, scale=width**-0.5, mask=mask)
    assert found.shape == expected.shape
    # What is added to a score of 500 is known to 3e-5.
    np.testing.assert_allclose(found, expected, atol=2e-6 * max(1.0, size))


def test_what_is_barred_weighs_nothing() -> None:
    queries = mx.ones((1, 1, 2, 4))
    keys = mx.array([[0.0] * 4, [1e4] * 4])[None, None]
    values = mx.array([[1.0], [7.0]])[None, None]
    mask = mx.array([[True, False], [True, True]])
    found = powers.attention(queries, keys, values, mask, 1.0)
    assert found.flatten().tolist() == [1.0, 7.0]


def test_gates_are_those_of_exponentials(by_powers: None) -> None:
    ends = [0.0, -0.0, 1e-30, 50.0, -50.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30]
    ends += [np.inf, -np.inf, np.nan]
    some = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 5
    gates = mx.array(np.concatenate([np.array(ends, np.float32), some]))
    for size in (1.0, 1e30):
        rows = mx.full(gates.shape, size)
        expected = swiglu(gates, rows)
        assert mx.array_equal(powers.gate(gates, rows), expected, equal_nan=True)
        found = _while_in_use(powers.gate, gates, rows)
        np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-30 * size)


def test_gates_of_half_precision_are_left_alone(by_powers: None) -> None:
    gates = mx.random.normal((500,)).astype(mx.bfloat16)
    assert mx.array_equal(_while_in_use(powers.gate, gates, gates), swiglu(gates, gates))


def test_nodes_take_them_and_single_rows_prompts_and_exact_rows_do_not(by_powers: None) -> None:
    model, plain = (tiny_llama() for _ in range(2))
    target = Target.of(model)
    assert _differs(_nodes(target), _nodes(Target.of(plain), taken=False)) > 0
    assert mx.allclose(_nodes(target), _nodes(Target.of(plain), taken=False), atol=1e-5)
    # The modules have been taught; mlx-lm's calls of them are what they were.
    for tokens in (TEXT, TEXT[:1]):
        assert _differs(*(one(tokens[None], make_prompt_cache(one)) for one in (model, plain))) == 0
    assert _differs(*(_nodes(ExactTarget(one)) for one in (model, plain))) == 0
    root = PrefixTree.root(TEXT[:1])
    assert _differs(_nodes(target, root), _nodes(Target.of(plain), root, taken=False)) == 0
    assert not powers.in_use.get()


def test_every_layer_takes_them(by_powers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("attention", "_gate"):
        own: Callable[..., mx.array] = getattr(powers, name)

        def counted(*args: Any, name: str = name, own: Callable[..., mx.array] = own) -> mx.array:
            calls.append(name)
            return own(*args)

        monkeypatch.setattr(powers, name, counted)
    model = tiny_llama()
    _nodes(Target.of(model))
    assert calls == ["attention", "_gate"] * len(model.layers)


def test_small_attention_is_left_to_mlx(by_powers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, past, nodes = 4, len(TEXT), len(TREE.tokens)
    monkeypatch.setattr(powers, "LEAST_WEIGHTS", heads * nodes * (past + nodes) + 1)
    calls: list[int] = []
    monkeypatch.setattr(powers, "attention", lambda *args: calls.append(1))
    _nodes(Target.of(tiny_llama()))
    assert not calls


def test_a_watched_module_is_taught_and_still_watched(by_powers: None) -> None:
    model, seen = tiny_llama(), []
    mlp = model.layers[0].mlp

    def heard(call: Callable[..., mx.array], *args: Any) -> mx.array:
        seen.append(args[0].shape)
        return call(*args)

    watch(mlp)
    target = Target.of(model)
    before = _nodes(target)
    assert mx.array_equal(hearing([Heard(mlp, heard)], _nodes, target), before)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "gpt_oss", "mixtral", "deepseek_v2"])
def test_models_of_other_gates_windows_and_sinks_say_the_same(by_powers: None, kind: str) -> None:
    model = tiny_model(kind)
    found, expected = (_nodes(Target.of(model), taken=taken) for taken in (True, False))
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(mx.abs(expected).max()))


def test_an_error_within_a_call_leaves_nothing_behind(
    by_powers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> mx.array:
        raise KeyboardInterrupt

    target = Target.of(tiny_llama())
    monkeypatch.setattr(powers, "attention", stop)
    with pytest.raises(KeyboardInterrupt):
        _nodes(target)
    assert not powers.in_use.get()


def _while_in_use(call: Callable[..., mx.array], *args: mx.array) -> mx.array:
    before = powers.in_use.set(True)
    try:
        return call(*args)
    finally:
        powers.in_use.reset(before)


def _differs(found: mx.array, expected: mx.array) -> int:
    return int((found != expected).sum())


def _nodes(target: Target, tree: PrefixTree = TREE, taken: bool = True) -> mx.array:
    """Return the logits of a tree's nodes behind the text."""
    caches = make_prompt_cache(target.model)
    target.forward(TEXT, caches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponentials, "by_powers", lambda: taken)
        logits = target.verify(tree, caches).logits
    mx.eval(logits)
    return logits
