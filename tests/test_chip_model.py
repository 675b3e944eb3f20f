"""The model of a chip: traces, what any shape is worth on them, and published curves."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from conftest import REPOSITORY
from half_models import REFERENCE

import mlx_distill
from mlx_distill import DraftPlan, InputError
from mlx_distill.benchmarking.chip_model import (
    Chip,
    PublishedCurve,
    best,
    predict,
    published_curves,
)
from mlx_distill.benchmarking.traces import TracedText, record_trace
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.recurrent import RecurrentDrafter

TRACES = REPOSITORY / "tests" / "draft_traces.json"
# A likely chain 1 - 3 and its likely sibling 2, of which the text takes 1 and 3.
PLACE = [[0, 0, 0, 1], [1, 3]]
CURVE = PublishedCurve("a chip", "a model", 0.010, {2: 0.012, 4: 0.013, 8: 0.030}, ("a paper",))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = REPOSITORY / "examples" / "m2_ultra_model.py"
    spec = importlib.util.spec_from_file_location("m2_ultra_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_shape_is_worth_what_of_its_tree_was_right() -> None:
    text = TracedText([PLACE] * 12)
    assert text.tokens_per_cycle(DraftPlan(4, 4, 4)) == 3
    assert text.tokens_per_cycle(DraftPlan(4, 1, 4)) == 2  # too short for node 3
    assert text.tokens_per_cycle(DraftPlan(4, 4, 3)) == 2  # node 3 is the fourth
    assert text.tokens_per_cycle(DraftPlan(1, 4, 3)) == 3  # without node 2 it is the third
    assert text.tree(0, DraftPlan(1, 4, 3)) == ((0, 0, 1), (0, 1, 2))


@pytest.mark.parametrize(
    "places",
    [
        [],
        [[[0]]],
        [[[], []]],
        [[[0, 1], []]],
        [[[0, 0], [2]]],
        [[[0, 0, 0], [1, 2]]],
    ],
)
def test_what_is_no_trace(places: Any) -> None:
    with pytest.raises(InputError, match="a trace must hold places"):
        TracedText(places)


def with_taps(drafter: Any) -> BoundDrafter:
    """Return a drafter that looks at a layer, too, without which it would draft something else."""
    network = RecurrentDrafter(dataclasses.replace(drafter.config, taps=(3,)))
    network.update(drafter.network.parameters())
    shape = network.tap_proj.weight.shape
    network.tap_proj.weight = mx.random.normal(shape, scale=0.02, key=mx.random.key(0))
    return BoundDrafter(network, drafter.embed, drafter.target)


@pytest.mark.parametrize("taps", [False, True])
def test_a_recorded_trace_tells_what_drafting_comes_to(
    taps: bool, whole_pair: tuple[Any, Any]
) -> None:
    """Greedy decoding with a fixed shape makes as many tokens per call."""
    pair = whole_pair
    drafter: Any = mlx_distill.load_drafter(REFERENCE, *pair)
    drafter = with_taps(drafter) if taps else drafter
    prompt = pair[1].encode("Ben had a red kite. One day")
    trace = record_trace(pair, drafter, prompt, 0.0, max_tokens=40)
    plan = DraftPlan(4, 4, 8)
    told = TracedText(trace["places"]).tokens_per_cycle(plan)
    options: dict[str, Any] = {"drafter": drafter, "plan": plan, "max_tokens": 40}
    *_, last = mlx_distill.stream_generate(*pair, prompt, **options)
    assert told == pytest.approx(last.tokens_per_call, rel=0.1)


def test_two_readings_of_a_published_curve() -> None:
    """All of a cycle was the call; or what the smallest took beyond a plain step was not."""
    assert [CURVE.call_s(n, hopeful=False) for n in (1, 2, 8)] == [0.010, 0.012, 0.030]
    hopeful = [CURVE.call_s(n, hopeful=True) for n in (1, 2, 8)]
    assert hopeful == pytest.approx([0.010, 0.010, 0.028])


def test_a_chip_adds_up() -> None:
    chip = Chip(1e9, 1e-4, drafter_bytes=1e6, dispatches_per_token=5.0, rest_dispatches=20.0)
    costs = chip.costs(CURVE, hopeful=False)
    told = predict(costs, [TracedText([PLACE] * 12)], DraftPlan(4, 2, 4), 200)
    assert told.cycle_s == pytest.approx(0.013 + 2 * (0.001 + 0.0005) + 0.002)
    assert told.speedup == pytest.approx(3 * 0.010 / told.cycle_s)
    found = best(costs, [TracedText([PLACE] * 12)])
    assert found.plan.nodes == 4
    assert found.speedup >= told.speedup


def test_published_curves_of_the_m2_ultra() -> None:
    """Near flat to 15 rows in float16, and a cliff at 16."""
    small = next(one for one in published_curves("m2-ultra") if one.model == "Vicuna-7B")
    steps = {rows: small.call_s(rows, hopeful=False) / small.plain_s for rows in (4, 15, 16)}
    assert steps[4] < steps[15] < 1.8
    assert steps[16] > 3
    assert 1 / small.plain_s == pytest.approx(40, rel=0.02)
    assert any("2403.09919" in source for source in small.sources)


def test_the_example_says_that_it_is_a_model(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.json"
    flags = ["--traces", str(TRACES), "--no-validation", "--output", str(output)]
    assert example.main(flags) == 0
    out = capsys.readouterr().out
    assert "MODEL, not a measurement" in out
    assert "arXiv 2403.09919" in out
    result = json.loads(output.read_text())
    assert result["what"] == "MODEL, not a measurement"
    assert {row["model"] for row in result["chip"]} == {"Vicuna-7B", "Vicuna-13B"}
    dear = [*flags[:-1], str(tmp_path / "dear.json"), "--dispatch-us", "1000"]
    assert example.main(dear) == 0
    assert "the planner parks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--traces", "nowhere", "--no-validation"], "nowhere holds no traces"),
        (["--traces", str(TRACES)], "add --no-validation"),
        (["--traces", str(TRACES), "--model", "m"], "instead of a pair; leave --model out"),
        (["--traces", str(TRACES), "--max-tokens", "9"], "leave --max-tokens out"),
        (["--traces", str(TRACES), "--no-validation", "--temp", "2"], "at temperature 2"),
        (["--bandwidth-gb-s", "0"], "bandwidth_gb_s must be"),
        (["--dispatch-us", "nan"], "dispatch_us must be"),
        (["--model", "m"], "needs a drafter"),
        (["--output", "."], "the output . is no name of a new"),
    ],
)
def test_the_example_refuses(
    example: ModuleType, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(flags) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1
