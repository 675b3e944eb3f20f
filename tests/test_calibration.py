"""Calibration: tasks timed by clocks of our own, files that are kept, or ignored and made anew."""

import argparse
import importlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from half_models import REFERENCE
from mlx import nn
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import cli
from mlx_distill.calibration import automatic, store
from mlx_distill.calibration.config import COARSE, QUICK, CalibrationConfig
from mlx_distill.calibration.measuring import Calibration, calibrate, quick_config, usable_contexts
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.report import plot, show
from mlx_distill.calibration.timing import Times, time_in_turn, typical_spread
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.draft_model import DraftModelDrafter
from mlx_distill.drafters.mixture import MixedDrafter
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner, Outcome
from mlx_distill.errors import InputError
from mlx_distill.evaluation.draft_costs import draft_costs
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner
from mlx_distill.target.memory import open_remembered

pytestmark = pytest.mark.usefixtures("quiet")
SMALL = CalibrationConfig((1, 2, 4), (16, 32), (1, 2), (1, 2), 3, cycles=2)
SOME = Times(1.0, 0.1, 3)
WHOLE = {("call", 16, 1): SOME, ("call", 16, 2): SOME, ("draft", 1, 1): SOME}
COSTS = Costs((16,), (1, 2), ((1.0, 1.1),), (1,), (1,), ((0.1,),), 0.05, spread=0.02)


@pytest.fixture(scope="module")
def pair(bundled_part: Path) -> Pair:
    model, tokenizer = mlx_distill.load(bundled_part)
    return Pair(model, tokenizer, mlx_distill.load_drafter(REFERENCE, model, tokenizer))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx_distill" / "calibration"


class Ticking:
    """A clock that a task moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def task(self, seconds: Callable[[], float]) -> Callable[[Any], float]:
        def run(clock: Any) -> float:
            took = seconds()
            self.now += took
            return took

        return run


def test_tasks_take_turns_and_the_first_round_does_not_count() -> None:
    clock, order = Ticking(), []
    first = iter([100.0, 1.0, 2.0, 3.0])

    def of(name: str, seconds: Callable[[], float]) -> Callable[[], float]:
        return lambda: (order.append(name), seconds())[1]

    tasks = {"a": clock.task(of("a", lambda: next(first))), "b": clock.task(of("b", lambda: 4.0))}
    times = time_in_turn(tasks, 3, 1e9, clock)
    assert times["a"] == Times(2.0, 0.5, 3)
    assert times["b"] == Times(4.0, 0.0, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert typical_spread(times.values()) == 0.25


def test_time_that_is_up_ends_the_rounds_but_not_before_the_third() -> None:
    def timed(seconds: float, limit_s: float) -> Times:
        clock = Ticking()
        return time_in_turn({"a": clock.task(lambda: seconds)}, 100, limit_s, clock)["a"]

    assert timed(1.0, 10.0) == Times(1.0, 0.0, 11)
    assert timed(9.0, 20.0) == Times(9.0, 0.0, 3)
    assert timed(9.0, 5.0) == Times(9.0, 0.0, 2)


def test_of_two_times_the_spread_is_how_far_they_lie_apart() -> None:
    assert Times.of([1.0, 1.5]) == Times(1.25, 0.4, 2)
    assert Times.of([1.0]).spread == 0.25


def test_a_first_time_that_compiles_leaves_the_others_theirs() -> None:
    clock = Ticking()
    first = iter([500.0])
    tasks = {"a": clock.task(lambda: next(first, 2.0)), "b": clock.task(lambda: 3.0)}
    times = time_in_turn(tasks, 3, 10.0, clock)
    assert [times["a"], times["b"]] == [Times(2.0, 0.0, 3), Times(3.0, 0.0, 3)]


def test_what_no_time_is_left_for_counts_as_it_was_warmed_up() -> None:
    clock = Ticking()
    tasks = {"a": clock.task(lambda: 9.0), "b": clock.task(lambda: 4.0)}
    assert time_in_turn(tasks, 3, 1.0, clock)["b"] == Times(4.0, 0.25, 1)


def test_a_pair_is_measured(pair: Pair) -> None:
    """What the clock says is what the costs say; the caches are as they were after every call."""
    ticks = iter(range(10**9))
    found = calibrate(pair, SMALL, lambda: float(next(ticks)))
    costs = found.costs
    assert costs.contexts == (16, 32)
    assert costs.rows == (1, 2, 4)
    assert all(time == 1.0 for row in (*costs.call_s, *costs.draft_s) for time in row)
    assert len(found.times) == 2 * 3 + 2 * 2 + 2 * 3
    for law in (costs, costs.sampled()):
        # A cycle, less a call and a draft.
        assert law.overhead_s == law.line_overhead_s == 1 - (1 + 1)
        assert law.plain_overhead_s == 0
        assert 1 <= law.cycle_tokens <= 5
    assert costs.spread == 0
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


def test_a_texts_first_draft_is_not_part_of_a_cycle(pair: Pair) -> None:
    """The first token does not wait for it, so what follows does."""
    clock = Ticking()

    class Slow:
        def __init__(self, drafter: Any):
            self.drafter, self.opened = drafter, {}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.drafter, name)

        def open(self, *arguments: Any) -> Any:
            state, waits = self.drafter.open(*arguments), iter([100.0])
            draft = state.draft

            def slow(*arguments: Any) -> Any:
                clock.now += next(waits, 1.0)
                return draft(*arguments)

            state.draft = slow
            return state

    def ticking() -> float:
        clock.now += 0.01
        return clock.now

    costs = calibrate(replace(pair, drafter=Slow(pair.drafter)), SMALL, ticking).costs
    assert 1.0 < costs.cycle(DraftPlan(), 8, 16) < 2.0


def test_a_cycle_without_a_draft_tells_nothing_of_drafting(pair: Pair) -> None:
    """An n-gram drafter is silent where nothing repeats, in this text or an earlier one."""
    silent = replace(pair, drafter=NGramDrafter(16, 16, store_tokens=0))
    ticks = iter(range(10**9))
    found = calibrate(silent, SMALL, lambda: float(next(ticks)))
    assert found.costs.overhead_s == found.costs.sampled_overhead_s == 0
    assert found.times["cycle", 0.0].count == 3


@pytest.mark.parametrize(("tick_s", "expected"), [(0.01, QUICK), (0.2, COARSE)])
def test_less_is_measured_where_steps_are_slow(
    pair: Pair, tick_s: float, expected: CalibrationConfig
) -> None:
    ticks = itertools.count()
    assert quick_config(pair, lambda: tick_s * next(ticks)) == expected


@pytest.fixture
def slow(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], float]]:
    """Return clocks on which a step takes so long, and every further row a tenth of that."""
    read: list[int] = []
    target = pair.target
    observe, verify = target.observe, target.verify

    def observed(tokens: mx.array, *others: Any) -> Any:
        read.append(tokens.size)
        return observe(tokens, *others)

    def verified(tree: Any, *others: Any) -> Any:
        read.append(tree.tokens.size)
        return verify(tree, *others)

    monkeypatch.setattr(target, "observe", observed)
    monkeypatch.setattr(target, "verify", verified)
    return lambda step_s: lambda: step_s * sum(0.9 + 0.1 * rows for rows in read)


@pytest.mark.parametrize("step_s", [0.05, 0.2])
def test_a_first_use_is_measured_in_less_than_20_seconds(
    pair: Pair, slow: Callable[[float], Callable[[], float]], step_s: float
) -> None:
    """The text that is read and what is under way are all that a deadline cannot cut."""
    clock = slow(step_s)
    read_s = 13.7 * step_s  # 128 tokens
    found = calibrate(pair, quick_config(pair, clock), clock, since=0.0)
    assert clock() < 20 + read_s
    counts = {name: times.count for name, times in found.times.items()}
    assert found.costs.rows[0] == 1
    if step_s == 0.05:
        assert min(counts.values()) == 3
        assert found.costs.rows == COARSE.rows
    if step_s == 0.2:  # what decides is known by then
        assert {("plain", 0.0), ("cycle", 0.0), ("call", 128, 8), ("draft", 4, 4)} <= counts.keys()
        assert found.costs.cycle_tokens >= 1


@pytest.mark.parametrize("ticks", [1, 40])
def test_what_there_is_no_time_for_is_left_out(pair: Pair, ticks: int) -> None:
    """The clock is asked so often before the deadline; a planner can do with what is known then."""
    asked = itertools.chain(range(ticks), itertools.count(10**6))
    config = replace(SMALL, deadline_s=1000.0)
    costs = calibrate(pair, config, lambda: float(next(asked))).costs
    assert costs.rows[0] == 1
    assert len(costs.contexts) * len(costs.rows) * len(costs.widths) * len(costs.lengths) < 24
    AdaptivePlanner(costs).shape(0, None)


def test_after_the_deadline_nothing_is_begun() -> None:
    """Not even to warm up; only what matters most is timed in any case."""

    def counts(until: float) -> dict[str, int]:
        clock = Ticking()
        tasks = {name: clock.task(lambda: 2.0) for name in "abc"}
        return {x: t.count for x, t in time_in_turn(tasks, 9, 1e9, clock, until=until).items()}

    assert counts(-1.0) == {"a": 1}
    assert counts(3.0) == {"a": 1, "b": 1}
    assert counts(9.0) == {"a": 1, "b": 1, "c": 1}
    assert counts(13.0) == {"a": 1, "b": 2, "c": 1}


def test_contexts_beyond_the_model_are_left_out(pair: Pair) -> None:
    assert usable_contexts(pair, CalibrationConfig()) == (128,)  # the model's are 512
    small = replace(pair, cache=CacheConfig(max_kv_size=150))
    assert usable_contexts(small, QUICK) == (47,)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode"])
def test_no_call_is_timed_that_reads_behind_a_table_of_positions(
    kind: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has no trees but lines, which are as deep as they have nodes."""
    sizes = {"vocab_size": pair.target.vocab_size, "n_positions": 40}
    sizes |= {"n_ctx": 40} if kind == "gpt2" else {}
    model = tiny_model(kind, **sizes)
    rows, read = SMALL.rows, nn.Embedding.__call__

    def look(table: nn.Embedding, ids: mx.array) -> mx.array:
        assert ids.max().item() < table.weight.shape[0]
        return read(table, ids)

    monkeypatch.setattr(nn.Embedding, "__call__", look)
    config = replace(SMALL, rows=(*rows, 39, 40, 64))
    small = Pair(model, pair.tokenizer, NGramDrafter(store_tokens=0))
    found = calibrate(small, config, crowded=lambda _: 0.0).costs
    assert (found.contexts, found.rows) == ((1,), (*rows, 39))
    assert draft_costs(small, DraftPlan(1, 4, 64), 1)["nodes"] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": (2, 4)}, "rows must hold 1"),
        ({"contexts": ()}, "contexts must name at least one number"),
        ({"widths": (0,)}, "widths must be at least 1, got 0"),
        ({"lengths": (65,)}, "lengths must be between 1 and 64, got 65"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        ({"limit_s": 0.0}, "limit_s must be above 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        CalibrationConfig(**options)


# ------------------------------------------------------------------------------------ files


def test_a_calibration_is_kept_and_found(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = store.identity(pair)
    assert store.find(known) is None
    assert store.keep(known, Calibration(COSTS, {}))
    assert store.find(known) == COSTS
    assert store.file_of(known).parent == folder
    others = (replace(pair, cache=CacheConfig(kv_bits=8)), replace(pair, drafter=NGramDrafter()))
    assert all(store.find(store.identity(other)) is None for other in others)
    assert capsys.readouterr().err == ""


def test_what_other_weights_brought_is_not_taken_over(pair: Pair, folder: Path) -> None:
    """What a cycle takes is: it is the same, and a drafter that learns is not measured anew."""
    known, costs = store.identity(pair), replace(COSTS, cycle_tokens=2.0, sampled_cycle_tokens=1.5)
    own = store.drafter_hash(pair.drafter)
    other = mlx_distill.load_drafter(REFERENCE, pair.model, pair.tokenizer)
    assert store.drafter_hash(MixedDrafter(other)) == own
    head = other.network.head  # pyright: ignore[reportAttributeAccessIssue]
    head.weight = head.weight + 1
    assert store.drafter_hash(other) != own
    assert store.identity(replace(pair, drafter=other)) == known
    store.keep(known, Calibration(costs, {}), own)
    assert store.find(known, own) == costs
    assert store.find(known, store.drafter_hash(other)) == COSTS


def test_drafters_of_other_sizes_are_told_apart(pair: Pair) -> None:
    """Two draft models have no settings of their own."""
    small, _ = mlx_distill.load(bundled("stories-4m"))
    drafters = [DraftModelDrafter(model, 4096) for model in (small, pair.model)]
    known = [store.identity(replace(pair, drafter=drafter)) for drafter in drafters]
    assert known[0] != known[1]


def test_precision_and_machine_tell_calibrations_apart(
    pair: Pair, bundled_part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = store.identity(pair)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert store.file_of(store.identity(pair)) != store.file_of(known)
    half, _ = mlx_distill.load(bundled_part)
    half.set_dtype(mx.float16)
    other = store.identity(replace(pair, model=half))
    assert other["target"] != known["target"]


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "of another machine": lambda text: text.replace('"cores"', '"kernels"'),
    "no costs": lambda text: text.replace('"costs"', '"prices"'),
    "negative": lambda text: text.replace("1.1", "-1.1"),
    "not a number": lambda text: text.replace("1.1", "NaN"),
    "costs that are a list": lambda text: text.replace('"costs": {', '"costs": 3, "old": {'),
    "beyond any number": lambda text: text.replace("1.1", f"{10**400}"),
    "rows beyond any number": lambda text: text.replace('"rows": [', f'"rows": [{10**400}, '),
    "threads beyond any": lambda text: text.replace('"threads": null', f'"threads": {10**400}'),
    "rows that are text": lambda text: text.replace('"rows": [', '"rows": ["a", '),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_named_and_ignored(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    known = store.identity(pair)
    store.keep(known, Calibration(COSTS, {}))
    file = store.file_of(known)
    text = file.read_text()
    file.write_text(DAMAGES[damage](text))
    assert file.read_text() != text
    assert store.find(known) is None
    said = capsys.readouterr().err
    assert said.startswith(f"mlx_distill: the calibration {file} is ignored and measured again")
    assert said.count("\n") == 1
    assert store.keep(known, Calibration(COSTS, {}))
    assert store.find(known) == COSTS


def test_a_folder_in_the_way_is_a_damaged_file(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = store.identity(pair)
    store.file_of(known).mkdir(parents=True)
    assert store.find(known) is None
    assert not store.keep(known, Calibration(COSTS, {}))
    assert capsys.readouterr().err.count("\n") == 2


def test_a_folder_that_cannot_be_written_costs_one_line(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder would be: root may write everywhere else."""
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("")
    assert not store.keep(store.identity(pair), Calibration(COSTS, {}))
    said = capsys.readouterr().err
    assert said.startswith(f"mlx_distill: the calibration cannot be kept in {folder}: ")
    assert said.count("\n") == 1


def test_a_user_without_a_home_costs_one_line(
    pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that are run as any number: it was a traceback, in every command."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    known = store.identity(pair)
    assert store.find(known) is None
    assert store.find_kernels(known) == []
    store.doubt(known)
    assert not store.keep(known, Calibration(COSTS, {}))
    said = "the calibration cannot be kept in the user's cache folder: no home folder is known"
    assert capsys.readouterr().err == f"mlx_distill: {said}\n"
    open_remembered(pair.model)


def test_what_was_measured_on_a_busy_machine_is_not_kept(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, busy = store.identity(pair), replace(COSTS, spread=0.4)
    assert not store.keep(known, Calibration(busy, {}))
    assert "the machine is busy: times differ by 40%" in capsys.readouterr().err
    assert not folder.exists()
    assert store.keep(known, Calibration(COSTS, {}))
    assert not store.keep(known, Calibration(busy, {}))
    assert store.find(known) == COSTS


def test_times_that_others_all_slowed_alike_are_of_a_busy_machine(
    pair: Pair, quiet: list[float]
) -> None:
    quiet[0] = 1.0
    ticks = iter(range(10**9))
    smaller = replace(SMALL, contexts=(16,))
    costs = calibrate(pair, smaller, lambda: float(next(ticks))).costs
    assert costs.spread == 1.0
    assert store.is_loaded(costs)


def test_what_is_contradicted_is_measured_again_but_not_for_ever(
    pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = store.identity(pair)
    store.doubt(known)
    assert not folder.exists(), "nothing is kept that could be doubted"
    for doubts in range(1, 5):
        store.keep(known, Calibration(COSTS, {}))
        for _ in range(5):  # every process that uses it until the machine is quiet
            store.doubt(known)
        found = store.find(known)
        assert found is not None
        assert store.is_loaded(found) == (doubts <= 3)
    assert capsys.readouterr().err == ""


def test_the_report_shows_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show(COSTS)
    said = capsys.readouterr().out
    assert "1.10 (1100.00)" in said
    assert "100.00" in said
    plot(COSTS, "a machine", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------- first use


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[CalibrationConfig]:
    """Return what has been measured, which takes no time."""
    monkeypatch.setenv(automatic.SWITCH, "1")
    done: list[CalibrationConfig] = []

    def calibrate_at_once(pair: Pair, config: CalibrationConfig, since: float) -> Calibration:
        done.append(config)
        return Calibration(COSTS, WHOLE)

    monkeypatch.setattr(automatic, "calibrate", calibrate_at_once)
    return done


def test_the_first_use_of_a_pair_measures_it_and_says_so(
    pair: Pair, measured: list[CalibrationConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert automatic.known_costs(pair) == COSTS
    assert measured in ([QUICK], [COARSE])  # by how fast its steps are
    said = capsys.readouterr().err
    assert "measuring this machine, up to 20 seconds" in said
    assert said.count("\n") == 1
    assert automatic.known_costs(pair) == COSTS
    assert measured in ([QUICK], [COARSE])  # by how fast its steps are
    assert capsys.readouterr().err == ""


def test_what_was_contradicted_is_used_until_the_machine_is_quiet(
    pair: Pair,
    measured: list[CalibrationConfig],
    quiet: list[float],
) -> None:
    """Every start beside other programs uses it with caution; the first quiet one measures."""
    automatic.known_costs(pair)
    store.doubt(store.identity(pair))
    quiet[0] = 1.0
    assert all(store.is_loaded(automatic.known_costs(pair)) for _ in range(3))
    assert len(measured) == 1
    quiet[0] = 0.05
    assert not any(store.is_loaded(automatic.known_costs(pair)) for _ in range(3))
    assert len(measured) == 2


def test_a_calibration_without_drafts_is_not_the_last_one(
    pair: Pair, measured: list[CalibrationConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling took all of its time; where calls are too slow, three times are enough."""
    without = Calibration(COSTS, {("call", 16, 1): SOME, ("draft", 1, 1): SOME})
    assert not without.knows_drafting
    monkeypatch.setattr(automatic, "calibrate", lambda *_, **__: measured.append(SMALL) or without)
    for start in range(6):
        automatic.known_costs(pair)
        assert len(measured) == min(start + 1, 4)
    assert Calibration(COSTS, {**WHOLE}).knows_drafting
    for name in (("call", 16, 2), ("draft", 1, 1)):
        less = {other: times for other, times in WHOLE.items() if other != name}
        assert not Calibration(COSTS, less).knows_drafting


def test_use_that_contradicts_a_calibration_lets_it_be_measured_again(
    pair: Pair, folder: Path
) -> None:
    """It says that a plain step takes a second; beside others it did, now it takes half of one."""
    known = store.identity(pair)
    store.keep(known, Calibration(COSTS, {}))
    dear = replace(COSTS, call_s=((1.0, 9.0),))  # nothing is drafted
    loaded = []
    for seconds in (1.0, 0.5):
        planner = automatic.planner_by(dear, pair, sampled=False)
        for _ in range(30):
            planner.shape(0, Outcome(8, (0,), 0, (0,), seconds=seconds))
        found = store.find(known)
        assert found is not None
        loaded.append(store.is_loaded(found))
    assert loaded == [False, True]


def test_all_texts_of_a_pair_have_one_planner(
    pair: Pair, measured: list[CalibrationConfig]
) -> None:
    again = mlx_distill.load_drafter(REFERENCE, pair.model, pair.tokenizer)
    other = replace(pair, drafter=again)
    planner = automatic.planner_of(other, sampled=False)
    assert isinstance(planner, AdaptivePlanner)
    assert automatic.planner_of(replace(other), sampled=False) is planner
    windowed = replace(other, cache=CacheConfig(max_kv_size=99))
    assert automatic.planner_of(windowed, sampled=False) is not planner
    assert automatic.planner_of(other, sampled=True) is not planner


def test_switched_off_nothing_is_measured(
    pair: Pair, measured: list[CalibrationConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(automatic.SWITCH, "0")
    assert automatic.planner_of(pair, sampled=False) == FixedPlanner(DraftPlan())
    assert not measured


@pytest.mark.parametrize("law", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_planned_text_is_the_plain_one(pair: Pair, law: dict[str, Any]) -> None:
    """Whatever the planner's costs are: here every row is free, then dear."""
    options: dict[str, Any] = {"max_tokens": 30, **law}
    expected = mlx_distill.generate(pair.model, pair.tokenizer, "Once upon a time", **options)
    rows, widths, lengths = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)
    drafts = ((0.01,) * 3,) * 3
    for calls in ((1.0,) * 4, (1.0, 1.5, 2.5, 4.5)):
        planner = AdaptivePlanner(Costs((64,), rows, (calls,), widths, lengths, drafts))
        responses = list(
            mlx_distill.stream_generate(
                pair.model,
                pair.tokenizer,
                "Once upon a time",
                drafter=pair.drafter,
                plan=planner,
                **options,
            )
        )
        assert "".join(response.text for response in responses) == expected
        assert responses[-1].drafted_tokens > 0 or calls[-1] > 1


def test_a_text_without_a_plan_is_planned_by_what_was_measured(
    pair: Pair, measured: list[CalibrationConfig]
) -> None:
    options: dict[str, Any] = {"drafter": pair.drafter, "max_tokens": 12}
    expected = mlx_distill.generate(pair.model, pair.tokenizer, "Once", max_tokens=12)
    with pytest.raises(InputError, match="the prompt is empty"):
        mlx_distill.generate(pair.model, pair.tokenizer, [], **options)
    fixed = options | {"plan": DraftPlan()}
    assert mlx_distill.generate(pair.model, pair.tokenizer, "Once", **fixed) == expected
    assert not measured
    assert mlx_distill.generate(pair.model, pair.tokenizer, "Once", **options) == expected
    assert measured in ([QUICK], [COARSE])  # by how fast its steps are


@pytest.mark.parametrize(
    ("flags", "plan"),
    [
        ([], None),
        (["--no-calibrate"], DraftPlan()),
        (["--nodes", "8"], DraftPlan()),
        (["--beam-width", "2", "--tree", "beam"], DraftPlan(2, tree="beam")),
    ],
)
def test_flags_of_a_shape_keep_it(
    flags: list[str],
    plan: DraftPlan | None,
    bundled_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = importlib.import_module("mlx_distill.generate")
    seen: list[Any] = []

    def no_text(*arguments: Any, **options: Any) -> Any:
        seen.append(options["plan"])
        return (one for one in ())

    monkeypatch.setattr(command, "stream_generate", no_text)
    assert command.main([*flags, "--max-tokens", "1"]) == 0
    assert seen == [plan]


def test_a_report_of_planned_drafts_names_no_shape() -> None:
    parser = argparse.ArgumentParser()
    cli.add_shape_flags(parser)
    for argv, nodes in (([], None), (["--no-calibrate"], 8), (["--beam-width", "2"], 8)):
        arguments = parser.parse_args(argv)
        cli.asked_shape(parser, argv, arguments)
        assert arguments.nodes == nodes
