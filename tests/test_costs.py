"""What decoding costs: interpolated between what was measured, and cautious beyond it."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.speculation.costs import Costs

COSTS = Costs(
    contexts=(100, 300),
    rows=(1, 2, 4, 8),
    call_s=((1.0, 1.1, 1.3, 1.7), (2.0, 2.3, 2.9, 4.1)),
    widths=(1, 4),
    lengths=(2, 4),
    draft_s=((0.1, 0.2), (0.3, 0.4)),
    overhead_s=0.05,
    spread=0.02,
)


@pytest.mark.parametrize(
    ("rows", "context", "expected"),
    [
        (4, 100, 1.3),
        (3, 100, 1.2),
        (4, 200, 2.1),
        (8, 10, 1.7),
        (12, 100, 2.1),  # as between 4 and 8
        (1, 300, 2.0),
    ],
)
def test_calls_between_what_was_measured(rows: int, context: int, expected: float) -> None:
    assert COSTS.calls([rows], context)[0] == pytest.approx(expected)


def test_a_cycle_is_a_draft_a_call_and_the_rest() -> None:
    assert COSTS.cycle(DraftPlan(4, 4), 8, 100) == pytest.approx(1.7 + 0.4 + 0.05)
    assert COSTS.cycle(DraftPlan(1, 3), 2, 100, batch=4) == pytest.approx(1.7 + 0.15 + 0.05)
    assert COSTS.plain(100, batch=2) == pytest.approx(1.1)


def test_what_runs_at_the_same_time_is_not_counted_twice() -> None:
    """A plain step that is built while the one before runs is shorter than its call."""
    ahead = replace(COSTS, plain_overhead_s=-0.4, sampled_overhead_s=0.3)
    assert ahead.plain(100) == pytest.approx(0.6)
    assert ahead.cycle(DraftPlan(4, 4), 8, 100) == COSTS.cycle(DraftPlan(4, 4), 8, 100)
    assert ahead.sampled().plain(100) == pytest.approx(1.0)
    assert ahead.sampled().cycle(DraftPlan(4, 4), 8, 100) == pytest.approx(1.7 + 0.4 + 0.3)
    far = replace(COSTS, plain_overhead_s=-9.0, overhead_s=-9.0)
    assert far.plain(100) > 0
    assert far.cycle(DraftPlan(4, 4), 8, 100) > 0


def test_a_line_has_a_rest_of_its_own() -> None:
    """Of a call no more is done meanwhile than of a plain step's."""
    line = replace(COSTS, plain_overhead_s=-0.3, line_overhead_s=-0.2, sampled_line_overhead_s=0.4)
    assert line.cycle(DraftPlan(1, 4, 5), 4, 100) == pytest.approx(1.3 + 0.2 - 0.2)
    assert line.cycle(DraftPlan(1, 2, 3), 4, 100) == pytest.approx(1.3 + 0.1 - 0.2)
    assert line.cycle(DraftPlan(4, 4), 8, 100) == COSTS.cycle(DraftPlan(4, 4), 8, 100)
    assert line.sampled().cycle(DraftPlan(1, 4, 5), 4, 100) == pytest.approx(1.3 + 0.2 + 0.4)
    least = replace(line, line_overhead_s=-2.0)
    assert least.cycle(DraftPlan(1, 4, 5), 4, 100) == pytest.approx(1.3 - 0.3)


@pytest.mark.parametrize("costs", [COSTS, replace(COSTS, contexts=(300,), call_s=COSTS.call_s[1:])])
def test_beyond_the_longest_context_further_rows_cost_more(costs: Costs) -> None:
    """Relative to a plain step, too, so that drafting is never overrated there."""
    extra = [costs.calls([8], n)[0] - costs.plain(n) for n in (300, 600, 1200, 4800)]
    assert extra[0] == pytest.approx(2.1)
    assert all(after >= 1.15 * before for before, after in itertools.pairwise(extra))


def test_where_longer_contexts_were_cheaper_extrapolation_is_not() -> None:
    odd = replace(COSTS, call_s=COSTS.call_s[::-1])
    assert odd.plain(10_000) == odd.plain(300)
    assert odd.calls([8], 600)[0] > odd.calls([8], 300)[0]


def test_json_and_back() -> None:
    assert Costs.from_dict(json.loads(json.dumps(COSTS.to_dict()))) == COSTS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": [2, 4, 8, 16]}, "rows must begin with 1"),
        ({"rows": [1, 2, 2, 4]}, "rows must be ascending"),
        ({"contexts": []}, "contexts must be ascending"),
        ({"contexts": "all"}, "contexts must be ascending"),
        ({"widths": [1.5, 2]}, "widths must be ascending"),
        ({"call_s": [[1.0, 1.1, 1.3]]}, "call_s must hold 2 rows of 4 times"),
        ({"call_s": 3}, "call_s must hold 2 rows"),
        ({"draft_s": [[0.1, float("nan")], [0.1, 0.2]]}, "draft_s must hold times"),
        ({"draft_s": [[0.1, "x"], [0.1, 0.2]]}, "draft_s must hold times"),
        ({"call_s": [[0.0, 1, 1, 1], [1, 1, 1, 1]]}, "call_s must hold times above 0"),
        ({"overhead_s": float("nan")}, "overhead_s must be a number"),
        ({"line_overhead_s": float("inf")}, "line_overhead_s must be a number"),
        ({"sampled_plain_overhead_s": "0"}, "sampled_plain_overhead_s must be a number"),
        ({"threads": 0}, "threads must be a whole number"),
        ({"threads": 1.5}, "threads must be a whole number"),
        ({"spread": -0.1}, "spread must be a number"),
        ({"spread": None}, "spread must be a number"),
        ({"colour": 1}, "costs must hold"),
    ],
    ids=str,
)
def test_tables_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Costs.from_dict(json.loads(json.dumps(COSTS.to_dict())) | change)
    with pytest.raises(InputError, match="costs must hold"):
        Costs.from_dict({"rows": [1]})
