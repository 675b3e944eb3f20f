"""What the tests' type checks find in calls into the package."""

import mlx.core as mx
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from type_checks import checked

from mlx_distill.arrays import to_number
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
