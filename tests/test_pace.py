"""What cycles take beside what was foretold, under drift, noise and stalls."""

import numpy as np
import pytest

from mlx_distill.speculation.pace import Pace
from mlx_distill.speculation.stopwatch import Stopwatch


def cycles(more: float, speed: float | np.ndarray, count: int, noise: float = 0.1) -> Pace:
    """Return the pace after cycles and plain steps in turn, eight of each."""
    pace, random = Pace(), np.random.default_rng(0)
    for place, slower in enumerate(np.broadcast_to(speed, count)):
        foretold = 1.5 if place % 16 < 8 else 1.0
        took = (
            slower * (1 + more * (foretold - 1) if foretold > 1 else 1) * random.lognormal(0, noise)
        )
        pace.learn(foretold, took)
    return pace


@pytest.mark.parametrize("more", [0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.6])
def test_what_drafting_adds_is_told_from_a_slow_machine(more: float, speed: float) -> None:
    pace = cycles(more, speed, 400)
    assert pace.price(1.5) == pytest.approx(1 + more * 0.5, rel=0.06)
    assert pace.prices(np.array([1.5]))[0] == pytest.approx(pace.price(1.5))


def test_what_should_have_cost_nothing_may_be_dear() -> None:
    pace = Pace()
    for place in range(200):
        pace.learn(*((1.01, 1.4) if place % 16 < 8 else (1.0, 1.0)))
    assert pace.price(1.01) == pytest.approx(1.4, rel=0.03)


@pytest.mark.parametrize("period", [60, 300])
def test_a_machine_that_drifts_changes_no_price(period: int) -> None:
    """By a third up and down; and drafts alone tell as little of what they cost as steps alone."""
    drift = 1 + 0.3 * np.sin(np.arange(900) / period * 2 * np.pi)
    assert cycles(1.3, drift, 900).price(1.5) == pytest.approx(1.65, rel=0.08)
    for foretold in (1.0, 1.5):
        pace = cycles(1.0, 1.0, 200)
        for slower in drift[: 3 * period // 4]:
            pace.learn(foretold, slower * foretold)
        assert pace.price(1.5) == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("foretold", [1.1, 1.2, 1.5])
def test_drafts_that_are_dearer_in_another_text_are_not_taken_for_a_slow_machine(
    foretold: float,
) -> None:
    """Though no plain step is seen: else a text that loses would seem to gain."""
    pace, random = cycles(1.0, 1.0, 200), np.random.default_rng(0)
    pace.another_text()
    took = [pace.learn(foretold, 1.5 * random.lognormal(0, 0.05)) for _ in range(60)]
    right = max(1.5, foretold)
    assert np.mean(took) == pytest.approx(right, rel=0.06)
    assert pace.price(foretold) == pytest.approx(right, rel=0.06)


def test_many_texts_at_once_are_no_less_known_than_one() -> None:
    prices = []
    for number in (1, 64):
        pace = cycles(1.3, 1.0, 200)
        for _ in range(number):
            pace.another_text()
        pace.learn(1.5, 3.0)
        prices.append(pace.price(1.5))
    assert prices[1] == pytest.approx(prices[0])


def test_a_stall_counts_as_a_slow_cycle() -> None:
    pace = cycles(1.0, 1.0, 200)
    assert pace.learn(1.5, 500.0) < 2.6
    assert pace.price(1.5) == pytest.approx(1.5, rel=0.06)


def test_a_cycle_is_priced_in_steps_of_its_own_time() -> None:
    pace = cycles(1.0, 2.0, 200)
    assert pace.learn(1.5, 2 * 1.6) == pytest.approx(1.6, rel=0.1)


def test_a_stopwatch_leaves_the_caller_out() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])

    def cycle(own_s: float, caller_s: float) -> float | None:
        now[0] += own_s
        took = watch.lap()
        with watch.away():
            now[0] += caller_s
        return took

    assert cycle(7.0, 0.5) is None
    assert cycle(10.0, 5.0) == pytest.approx(10.0)
    assert cycle(10.0, 0.0) is None  # while the caller was away, the device may have worked
    assert cycle(3.0, 0.0) == pytest.approx(3.0)
