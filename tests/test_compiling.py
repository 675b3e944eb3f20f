"""Drafts that are compiled once their shape has proved to be used."""

from functools import partial
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.drafters import compiling
from mlx_distill.drafters.compiling import CompiledDrafts


class Drafts:
    """Counts how often Python makes a draft; a compiled one does that at its first use alone."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, width: int, length: int, serial: int, x: mx.array, *noise: mx.array) -> Any:
        self.made += 1
        return x + width, x + length, x + len(noise), x * 2


def results(
    drafts: CompiledDrafts, made: Drafts, shape: tuple[int, int, bool], count: int
) -> list[list[int]]:
    arrays = (mx.array(10), mx.array(0)) if shape[2] else (mx.array(10),)
    return [
        [x.item() for x in drafts.of(shape, partial(made, *shape[:2]))(*arrays)]
        for _ in range(count)
    ]


def test_a_shape_is_compiled_once_it_is_used_again_and_again() -> None:
    made = Drafts()
    drafts = CompiledDrafts()
    for shape, expected in (((2, 3, False), [12, 13, 10, 20]), ((1, 4, True), [11, 14, 11, 20])):
        before, kept = made.made, len(drafts)
        assert results(drafts, made, shape, compiling.COMPILED_AT - 1)[0] == expected
        assert made.made == before + compiling.COMPILED_AT - 1
        assert len(drafts) == kept
        assert results(drafts, made, shape, 6) == [expected] * 6
        assert made.made == before + compiling.COMPILED_AT
        assert len(drafts) == kept + 1
    drafts.forget()
    assert len(drafts) == 0
    results(drafts, made, (2, 3, False), 2)
    assert len(drafts) == 1


def test_where_speeds_are_measured_every_shape_is_compiled_at_once() -> None:
    made, drafts = Drafts(), CompiledDrafts()
    drafts.forget(at_once=True)
    results(drafts, made, (2, 3, False), 1)
    assert len(drafts) == 1


def test_those_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_COMPILED", 2)
    made = Drafts()
    drafts = CompiledDrafts()
    drafts.forget(at_once=True)
    for width in (1, 2, 1, 3):
        results(drafts, made, (width, 1, False), 1)
    before = made.made
    results(drafts, made, (1, 1, False), 1)
    assert made.made == before
    results(drafts, made, (2, 1, False), 1)
    assert made.made == before + 1
