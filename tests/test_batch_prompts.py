"""Prompts that are read together: a text's own features, in as many calls as one text takes."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_distill import DraftPlan
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.drafters.protocol import Features, FixedPlanner
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request


class Looking(NoDrafter):
    """Notes what it is shown of prompts.

    Args:
        taps: Layers that it looks at.
        look_back: Tokens of a prompt that it looks at.
    """

    def __init__(self, taps: tuple[int, ...], look_back: int):
        self.taps, self.look_back = taps, look_back
        self.vocab_size = 4096
        self.shown: dict[int, Features] = {}

    def open(self, prompt: mx.array, features: Features) -> "Looking":
        self.shown[prompt.size] = features
        return self


def read(pair: tuple[Any, Any], drafter: Looking, sizes: list[int], batch: int) -> None:
    """Write the first tokens after prompts of some sizes, with chunks of four tokens."""
    engine = Engine(*pair, drafter, batch=batch)
    for size in sizes:
        prompt, cache = mx.arange(10, 10 + size), CacheConfig(prefill_step_size=4)
        planner = FixedPlanner(DraftPlan())
        engine.submit(Request(prompt, planner=planner, cache=cache, max_tokens=2))
    while engine.busy:
        engine.step()


@pytest.mark.parametrize(("taps", "look_back"), [((), 1), ((), 6), ((1, 0), 6)])
def test_drafters_are_shown_what_they_are_shown_of_one_prompt(
    pair: tuple[Any, Any], taps: tuple[int, ...], look_back: int
) -> None:
    """Whatever the lengths: of one token, shorter than what is looked at, a whole chunk, more."""
    together, alone = Looking(taps, look_back), Looking(taps, look_back)
    read(pair, together, [13, 1, 5, 2, 4, 90], batch=6)
    for size in (13, 1, 5, 2, 4, 90):
        read(pair, alone, [size], batch=1)
        found, right = together.shown[size], alone.shown[size]
        assert found.states.shape == right.states.shape
        assert len(found.taps) == len(taps)
        for ours, theirs in zip(
            (found.states, *found.taps), (right.states, *right.taps), strict=True
        ):
            assert mx.allclose(ours, theirs, atol=1e-4, rtol=1e-3).item()


def test_texts_that_begin_together_share_the_calls_that_read_them(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    call = llama.Model.__call__

    def counted(model: llama.Model, inputs: mx.array, *rest: Any, **options: Any) -> mx.array:
        shapes.append(inputs.shape)
        return call(model, inputs, *rest, **options)

    read(pair, Looking((), 1), [3], batch=2)  # what the model supports is known then
    monkeypatch.setattr(llama.Model, "__call__", counted)
    read(pair, Looking((), 1), [7, 5, 200, 6], batch=4)
    assert [shape for shape in shapes if shape[0] == 3] == [(3, 4), (3, 2), (3, 1)]
