"""Watched modules: threads do not hear each other, copies are watched, nothing stays behind."""

import copy
import threading
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from interrupting import interrupted
from mlx import nn
from tiny_models import tiny_model

from mlx_distill.target.body import Body
from mlx_distill.target.head import find_head
from mlx_distill.target.taps import tapped
from mlx_distill.target.watching import Heard, hearing, listening, listening_once

TOKENS = mx.array([[5, 9, 33, 2, 7]])


def doubled(call: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    return 2 * call(x)


def test_the_latest_listener_stands_outermost() -> None:
    module = nn.Linear(3, 3, bias=False)
    plain = module(mx.ones((1, 3)))

    def plus_one(call: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        return call(x) + 1

    with listening([Heard(module, doubled), Heard(module, plus_one)]):
        np.testing.assert_allclose(module(mx.ones((1, 3))), 2 * plain + 1)
        with listening([Heard(module, doubled)]):
            np.testing.assert_allclose(module(mx.ones((1, 3))), 4 * plain + 2)
    np.testing.assert_array_equal(module(mx.ones((1, 3))), plain)


@pytest.mark.usefixtures("unchecked_types")
def test_nothing_stands_around_once_a_call_was_interrupted() -> None:
    module = nn.Linear(3, 3, bias=False)
    plain = module(mx.ones((1, 3)))

    def outer(x: mx.array) -> mx.array:
        return hearing([Heard(module, doubled)], module, x)

    call = lambda: hearing([Heard(module, doubled)], outer, mx.ones((1, 3)))  # noqa: E731
    np.testing.assert_allclose(call(), 4 * plain)
    for moment in range(1, interrupted(call, None) + 1):
        interrupted(call, moment)
        np.testing.assert_array_equal(module(mx.ones((1, 3))), plain, f"moment {moment}")


def test_a_look_leaves_no_watched_class_behind() -> None:
    model = tiny_model("llama")
    before = [type(part) for _, part in model.named_modules()]
    with listening_once([Heard(part, doubled) for part in (model.model.norm, model.lm_head)]):
        model(TOKENS)
    assert [type(part) for _, part in model.named_modules()] == before


def test_modules_of_a_kind_share_a_class_and_keep_its_name() -> None:
    model = tiny_model("llama")
    with tapped(model, [0, 1]):
        pass
    first, second, _ = model.layers
    assert type(first) is type(second)
    assert type(first).__name__ == "TransformerBlock"


def test_a_copy_of_a_watched_model_is_a_model() -> None:
    model = tiny_model("llama")
    expected = model(TOKENS)
    with tapped(model, [0]) as outputs:
        other = copy.deepcopy(model)
        np.testing.assert_array_equal(other(TOKENS), expected)
        assert not outputs
    with tapped(other, [0]) as outputs:
        other(TOKENS)
    assert set(outputs) == {0}


def test_a_thread_that_calls_a_model_does_not_notice_one_that_watches_it() -> None:
    """Today's neighbour calls it plainly while this thread taps, cuts and looks for heads."""
    model = tiny_model("llama")
    expected = np.array(model(TOKENS))
    wrong: list[object] = []
    done = threading.Event()

    def plainly() -> None:
        while not done.is_set():
            try:
                if not np.array_equal(np.array(model(TOKENS)), expected):
                    wrong.append("other logits")
            except Exception as error:
                wrong.append(error)

    neighbour = threading.Thread(target=plainly)
    neighbour.start()
    try:
        for _ in range(15):
            find_head(model, TOKENS)
            body = Body.of(model)
            assert body is not None
            with tapped(model, [0, 1, "model.norm"]) as outputs:
                hidden = body(TOKENS)
            assert set(outputs) == {0, 1, "model.norm"}
            np.testing.assert_allclose(body.head(hidden), expected, atol=1e-5)
    finally:
        done.set()
        neighbour.join()
    assert not wrong, wrong[0]
