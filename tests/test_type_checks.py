"""What the tests' type checks find in calls into the package."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from type_checks import CALLS, begin, checked

from mlx_distill.arrays import to_number
from mlx_distill.core.draft import Draft
from mlx_distill.losses.response import entropy, forward_kl


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_number(3),  # no axes
        lambda: entropy(mx.array([1, 2])),  # the wrong type of number
        lambda: forward_kl(mx.zeros((2, 5)), mx.zeros((2, 4))),  # two sizes of one axis
    ],
)
def test_mistakes_in_calls_are_found(call):
    with pytest.raises(BeartypeCallHintViolation):
        call()


@pytest.mark.parametrize(
    ("axes", "right", "wrong"),
    [
        ("n n", (2, 2), (2, 3)),
        ("n m", (2, 0), (2, 2, 1)),
        ("n 3", (2, 3), (2, 4)),
        ("_ _", (2, 3), (2,)),
        ("... n 1", (2, 3, 1), (2, 3)),
        ("*s n", (2, 3, 1), ()),
    ],
)
def test_arrays_of_other_shapes_are_found_whatever_was_right_before(
    axes: str, right: tuple[int, ...], wrong: tuple[int, ...]
):
    kind: Any = Float[mx.array, axes]
    for _ in range(2):
        assert isinstance(mx.zeros(right), kind)
        assert not isinstance(mx.zeros(wrong), kind)
        assert not isinstance(mx.zeros(right, mx.int32), kind)
        assert not isinstance(np.zeros(right, np.float32), kind)


def test_a_size_of_several_arrays_is_one():
    def taken(
        one: Float[mx.array, " n"], other: Float[mx.array, "n m"], third: Float[mx.array, "m n"]
    ) -> None: ...

    check = checked(taken)
    for n, m in ((0, 2), (3, 0), (2, 3)):
        check(mx.zeros(n), mx.zeros((n, m)), mx.zeros((m, n)))
        for wrong in ((n + 1, m, m, n + 1), (n, m + 1, m, n), (n, m, m, n + 1)):
            with pytest.raises(BeartypeCallHintViolation):
                check(mx.zeros(n), mx.zeros(wrong[:2]), mx.zeros(wrong[2:]))


def test_fields_of_what_is_made_are_checked():
    fields = [mx.array([1, 2]), mx.array([0, 0]), mx.array([0, 1]), mx.array([0.0, -1.0])]
    Draft(*fields, 1)
    for place, wrong in ((1, mx.array([0])), (3, mx.array([0, 1])), (4, "1")):
        changed: list[Any] = [*fields, 1]
        changed[place] = wrong
        with pytest.raises(BeartypeCallHintViolation):
            Draft(*changed)


def test_axes_of_what_is_returned_are_those_of_the_arguments():
    def grown(rows: Float[mx.array, "n V"]) -> Float[mx.array, "n V"]:
        return mx.zeros((rows.shape[0], rows.shape[1] + 1))

    with pytest.raises(BeartypeCallHintViolation):
        checked(grown)(mx.zeros((2, 3)))


def test_every_call_has_axes_of_its_own():
    def inner(rows: Float[mx.array, "n V"]) -> int:
        return rows.shape[1]

    def outer(rows: Float[mx.array, "n V"]) -> int:
        return checked(inner)(rows[:, 1:])

    assert checked(outer)(mx.zeros((2, 3))) == 2


def test_a_function_in_a_function_is_checked_as_it_is_made_first():
    def make():
        def twice(x: int) -> int:
            return 2 * x

        return checked(twice)

    first, second = make(), make()
    with pytest.raises(BeartypeCallHintViolation):
        first("a")
    assert second("a") == "aa"


def test_the_first_calls_of_every_test_are_checked():
    def twice(x: int) -> int:
        return 2 * x

    typed = checked(twice)
    for _ in range(CALLS - 1):
        typed(1)
    with pytest.raises(BeartypeCallHintViolation):
        typed("a")
    assert typed("a") == "aa"
    begin()
    with pytest.raises(BeartypeCallHintViolation):
        typed("a")
