"""What drafts where nobody says it: ways take turns in a text, the fastest is kept."""

import importlib
import json
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill import InputError, load_drafter, stream_generate
from mlx_distill.benchmarking.arms import settled
from mlx_distill.calibration import choosing as module
from mlx_distill.calibration.choosing import Choosing, choosing
from mlx_distill.calibration.config import CalibrationConfig
from mlx_distill.calibration.measuring import calibrate
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.trial import Trial, TrialPlanner
from mlx_distill.core.sampling import GREEDY
from mlx_distill.drafters.auto import BOTH, DRAFTER, NGRAMS, NOTHING, ArmPlan, AutoDrafter
from mlx_distill.drafters.mixture import MixedDrafter
from mlx_distill.drafters.ngram import PAIR, NGramDrafter
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner, Outcome
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner
from mlx_distill.target import target

generate = importlib.import_module("mlx_distill.generate")

ARMS = (BOTH, DRAFTER, NGRAMS, NOTHING)
COSTS = Costs((16,), (1, 2, 8), ((1.0, 1.1, 1.3),), (1, 4), (1, 4), ((0.1, 0.2), (0.1, 0.2)))
# Seconds and tokens of a cycle, and what is chosen: both unless another is clearly better, and
# nothing unless any is clearly better than plain decoding.
CASES: dict[str, tuple[dict[str, tuple[float, int]], str]] = {
    "both": ({BOTH: (1.5, 3), DRAFTER: (1.4, 2), NGRAMS: (1.2, 1), NOTHING: (1.0, 1)}, BOTH),
    "alone": ({BOTH: (1.7, 2), DRAFTER: (1.4, 2), NGRAMS: (1.2, 1), NOTHING: (1.0, 1)}, DRAFTER),
    "alike": ({BOTH: (1.41, 2), DRAFTER: (1.4, 2), NGRAMS: (1.0, 1), NOTHING: (1.0, 1)}, BOTH),
    "copies": ({BOTH: (2.0, 2), DRAFTER: (1.4, 1), NGRAMS: (1.1, 2), NOTHING: (1.0, 1)}, NGRAMS),
    "none": ({BOTH: (1.96, 2), DRAFTER: (1.4, 1), NGRAMS: (1.0, 1), NOTHING: (1.0, 1)}, NOTHING),
}


class Machine:
    """Decodes as the loop does: a draft is read two calls after it was asked for."""

    def __init__(self, trial: Trial, cycles: dict[str, tuple[float, int]]):
        self.now, self.cycles = 0.0, cycles
        planners = {arm: FixedPlanner(DraftPlan()) for arm in ARMS if arm != NOTHING}
        self.planner = TrialPlanner(trial, planners, lambda: self.now)

    def write(self, tokens: int, slow: float = 0.0) -> None:
        asked, outcome = deque([NOTHING, NOTHING], 2), None
        while tokens > 0:
            plan = self.planner.shape(7, outcome)
            arm = plan.arm if isinstance(plan, ArmPlan) else NOTHING
            seconds, gained = self.cycles[asked[-1]]
            if slow and arm != NOTHING:  # what is compiled at its first use
                seconds, slow = seconds + slow, 0.0
            self.now += seconds
            parents = (0,) * (1 if asked[-1] == NOTHING else 8)
            outcome = Outcome(16, parents, gained - 1, tuple(range(gained)))
            asked.append(arm)
            tokens -= gained


@pytest.mark.parametrize("case", CASES)
def test_the_fastest_is_chosen(case: str) -> None:
    """Each is timed by itself: no cycle counts that another had a part in."""
    cycles, best = CASES[case]
    trial = Trial(ARMS)
    machine = Machine(trial, cycles)
    machine.write(1000, slow=500.0)
    assert trial.is_over
    for arm in ARMS:
        seconds, tokens = cycles[arm]
        counted = [one for one in trial.cycles[arm] if one[0] < 100]
        assert all(one == (pytest.approx(seconds), tokens) for one in counted)
    assert trial.decide(0.0) == best
    assert trial.speedup(NOTHING) == 1


def noisy(seconds: float, mean: float, count: int, seed: int) -> list[tuple[float, int]]:
    """Return cycles that all take as long and bring different numbers of tokens."""
    draws = np.random.default_rng(seed).poisson(mean - 1, count)
    return [(seconds, 1 + int(draw)) for draw in draws]


def test_what_errors_do_not_tell_apart_goes_on() -> None:
    """Forty cycles of 2.4 and 2.2 tokens say little; what is far behind has no further turns."""
    near = {BOTH: noisy(1.5, 2.2, 40, 1), DRAFTER: noisy(1.5, 2.4, 40, 2)}
    far = {NGRAMS: noisy(1.5, 1.2, 60, 3), NOTHING: [(1.0, 1)] * 70}
    trial = Trial(ARMS, near | far)
    assert trial.open == [BOTH, DRAFTER]
    trial.cycles |= {BOTH: noisy(1.5, 2.2, 4000, 4), DRAFTER: noisy(1.5, 2.4, 4000, 5)}
    assert trial.is_over
    assert trial.decide(0.0) == DRAFTER


def test_ways_that_are_alike_do_not_go_on_for_ever() -> None:
    cycles = {arm: noisy(1.5, 2.2, 300, 7) for arm in (BOTH, DRAFTER, NGRAMS)}
    trial = Trial(ARMS, cycles | {NOTHING: [(1.0, 1)] * 70})
    assert trial.is_over
    assert trial.following() == BOTH, "until the text ends"


def test_an_error_is_that_of_many_trials() -> None:
    def trial(seed: int) -> Trial:
        return Trial((NGRAMS, NOTHING), {NGRAMS: noisy(1.5, 2.2, 200, seed)})

    speeds = [trial(seed).speed(NGRAMS) for seed in range(400)]
    errors = [trial(seed).error(NGRAMS) for seed in range(400)]
    assert np.std(speeds) == pytest.approx(np.mean(errors), rel=0.15)


def test_a_way_of_which_little_is_known_waits_for_its_turns() -> None:
    trial = Trial(ARMS, {arm: [(1.0, 1)] * 64 for arm in ARMS[:-1]})
    assert trial.open == [NOTHING]
    assert trial.best == BOTH, "the one that suits most texts"


def test_a_trial_goes_on_in_later_texts() -> None:
    cycles, trial = CASES["both"][0], Trial(ARMS)
    for _ in range(40):
        Machine(trial, cycles).write(40)
    assert trial.is_over
    assert Trial.from_dict(json.loads(json.dumps(trial.to_dict())), ARMS) == trial


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quiet: list[float]) -> Path:
    """Plan by costs that nobody has to measure; return the folder of what is remembered."""
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "known_costs", lambda pair: COSTS)
    return tmp_path / "mlx_distill" / "calibration"


def nothing() -> Generator[int, None, None]:
    yield from ()


def finished(choice: Choosing, case: str) -> None:
    """Let a trial be over that came to a case's figures, with the end of a text."""
    found = choice.choose()
    for arm, (seconds, tokens) in CASES[case][0].items():
        choice.trial.cycles[arm] = [(seconds, tokens)] * 64
    assert not list(found.listen(nothing()))


def test_what_was_chosen_is_remembered(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    measured: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def auto() -> AutoDrafter:
        return AutoDrafter(bundled_drafter, "small")

    one = auto()
    found = choosing(Pair(*bundled_pair, one), one, sampled=False)
    assert "small, small alone, n-grams alone and plain decoding are tried" in found.sentence()
    finished(found, "both")
    sentence = (
        "drafting with n-grams and small: 2.00 of plain decoding's speed in a trial of 448 tokens; "
        "small alone 1.43; n-grams alone 0.83"
    )
    assert sentence in capsys.readouterr().err
    other = auto()
    again = choosing(Pair(*bundled_pair, other), other, sampled=False)
    assert again.sentence() == sentence
    assert again.choose().drafter is other.arms[BOTH]
    assert choosing(Pair(*bundled_pair, other), other, sampled=True).trial.chosen is None
    assert choosing(Pair(*bundled_pair, other), other, sampled=False) is again
    assert capsys.readouterr().err == "", "it is said once"


def test_what_loses_is_not_chosen(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, measured: Path
) -> None:
    auto = AutoDrafter(bundled_drafter, "small")
    found = choosing(Pair(*bundled_pair, auto), auto, sampled=False)
    finished(found, "none")
    assert "nothing drafts here" in found.sentence()
    assert found.choose().drafter is None
    last = list(stream_generate(*bundled_pair, "Once", drafter=auto, max_tokens=5))[-1]
    assert last.drafted_tokens == 0


def test_a_busy_machine_decides_nothing_for_good(
    bundled_pair: tuple[Any, Any], measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = AutoDrafter(None)
    found = choosing(Pair(*bundled_pair, auto), auto, sampled=False)
    found.trial.cycles[NGRAMS] = [(0.2, 1)] * 64
    found.trial.cycles[NOTHING] = [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)] * 16
    assert not list(found.choose().listen(nothing()))
    assert "the machine is busy" in capsys.readouterr().err
    assert not measured.exists()


class Calendar:
    """What a clock on the wall says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1e9
        monkeypatch.setattr(module.time, "time", lambda: self.now)


def test_what_a_crowded_machine_says_is_followed_for_a_while(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    measured: Path,
    quiet: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its times lie close together: the same programs run beside all of them."""
    calendar, quiet[0] = Calendar(monkeypatch), 1.0
    auto = AutoDrafter(bundled_drafter, "small")
    found = choosing(Pair(*bundled_pair, auto), auto, sampled=False)
    assert not list(found.choose().listen(nothing()))
    assert not found._crowded, "where nothing was counted, nobody looks"
    finished(found, "none")
    assert "the machine is busy, so this is tried again" in capsys.readouterr().err
    assert not measured.exists()
    calendar.now += 500
    assert found.choose().drafter is None
    calendar.now += 500
    quiet[0] = 0.0
    finished(found, "both")
    assert found.choose().drafter is auto.arms[BOTH]
    again = AutoDrafter(bundled_drafter, "small")
    assert choosing(Pair(*bundled_pair, again), again, sampled=False).trial.chosen == BOTH


def test_that_nothing_drafts_is_tried_again_the_next_day(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened() -> Choosing:
        auto = AutoDrafter(bundled_drafter, "small")
        return choosing(Pair(*bundled_pair, auto), auto, sampled=False)

    calendar = Calendar(monkeypatch)
    finished(first := opened(), "none")
    calendar.now += 80_000
    assert opened().trial.chosen == NOTHING
    calendar.now += 10_000
    assert "are tried in turn" in opened().sentence()
    assert first.choose().drafter is first.auto, "a process that goes on tries again, too"
    finished(opened(), "both")
    calendar.now += 1e6
    assert opened().trial.chosen == BOTH


def test_what_drafts_is_tried_again_where_texts_are_parked(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, measured: Path
) -> None:
    def opened() -> Choosing:
        auto = AutoDrafter(bundled_drafter, "small")
        return choosing(Pair(*bundled_pair, auto), auto, sampled=False)

    def text(found: Choosing, count: int, parked: bool) -> None:
        choice = found.choose()
        assert callable(choice.plan)
        planner = choice.plan()
        assert isinstance(planner, AdaptivePlanner)
        planner._wait = 32 * parked
        assert len(list(choice.listen(one for one in range(count)))) == count

    finished(opened(), "both")
    for parked in (True, True, False, True, True):
        text(opened(), 100, parked)
        assert opened().trial.chosen == BOTH
    text(opened(), 20, parked=True)
    assert opened().trial.chosen == BOTH, "a short text says nothing"
    text(opened(), 100, parked=True)
    assert opened().trial.chosen is None


@pytest.mark.parametrize(
    "damage",
    [
        {"chosen": "both"},
        {"cycles": {NGRAMS: [[1.0, 1]]}},
        {"cycles": {NGRAMS: [[-1.0, 1]], NOTHING: []}},
        {"cycles": {NGRAMS: [[1.0, True]], NOTHING: 3}},
        {"cycles": {NGRAMS: [[10**400, 1]], NOTHING: []}},
        {"cycles": {NGRAMS: [[1.0, 10**400]], NOTHING: []}},
        {"when": 10**400},
        {"chosen": NGRAMS},
        {"when": -1},
        {"parked": "often"},
        {"identity": {}},
    ],
)
def test_a_damaged_trial_is_made_again(
    damage: dict[str, Any],
    bundled_pair: tuple[Any, Any],
    measured: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def found() -> Choosing:
        auto = AutoDrafter(None)
        return choosing(Pair(*bundled_pair, auto), auto, sampled=False)

    begun = found()
    begun.trial.cycles[NOTHING] = [(1.0, 1)]
    assert not list(begun.choose().listen(nothing()))
    (file,) = measured.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    assert found().trial == Trial((NGRAMS, NOTHING))
    assert "is ignored and measured again" in capsys.readouterr().err


@pytest.mark.parametrize("law", [{}, {"temperature": 1.0, "seed": 2, "top_p": 0.9}])
def test_the_text_does_not_depend_on_the_turns(
    law: dict[str, Any],
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_distill.calibration.trial.TURN", 8)
    auto = AutoDrafter(bundled_drafter, "small")
    options = {"max_tokens": 60, **law}
    plain = [one.token for one in stream_generate(*bundled_pair, "One day", **options)]
    found = list(stream_generate(*bundled_pair, "One day", drafter=auto, **options))
    assert [one.token for one in found] == plain
    assert found[-1].accepted_tokens > 0
    trial = choosing(Pair(*bundled_pair, auto), auto, sampled=bool(law)).trial
    assert all(trial.cycles[arm] for arm in ARMS)
    (file,) = measured.iterdir()
    assert json.loads(file.read_text())["cycles"][DRAFTER]


def test_a_text_that_is_refused_or_never_begins_keeps_no_other_from_the_trial(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, measured: Path
) -> None:
    """Nothing was tried in the process any more after one empty prompt."""
    auto = AutoDrafter(bundled_drafter, "small")
    with pytest.raises(InputError, match="the prompt is empty"):
        stream_generate(*bundled_pair, "", drafter=auto)
    left = [stream_generate(*bundled_pair, "One day", drafter=auto) for _ in range(2)]
    left.pop().close()
    left.pop()
    trial = choosing(Pair(*bundled_pair, auto), auto, sampled=False)
    assert trial.choose().drafter is auto
    tried = stream_generate(*bundled_pair, "One day", drafter=auto, max_tokens=8)
    next(tried)
    assert trial.choose().drafter is bundled_drafter, "one text at a time is timed"
    tried.close()
    assert trial.choose().drafter is auto


def test_a_model_is_opened_as_it_was_found(
    bundled_part: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, open_model = [], target.open_model

    def opened(model: Any, way: str | None = None) -> Any:
        known.append(way)
        return open_model(model, way)

    monkeypatch.setattr(target, "open_model", opened)
    for _ in range(2):
        assert generate.main(["--model", str(bundled_part), "--max-tokens", "1"]) == 0
    assert known == [None, "row"]


def test_a_benchmark_lets_the_trial_come_to_its_end(
    bundled_pair: tuple[Any, Any], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_distill.calibration.trial.TURN", 8)
    monkeypatch.setattr("mlx_distill.calibration.trial.COUNTED", 8)
    auto = AutoDrafter(None)
    found = settled(Pair(*bundled_pair, auto), GREEDY, [[1, 5, 9], [1, 7]], 24)
    assert found.trial.chosen in auto.arms


def test_a_benchmark_goes_on_until_arms_that_are_alike_are_known_well(
    bundled_pair: tuple[Any, Any], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's texts are of 128 tokens, and so a trial was left in its midst."""
    for name, value in (("TURN", 8), ("COUNTED", 8), ("MOST", 48)):
        monkeypatch.setattr(f"mlx_distill.calibration.trial.{name}", value)
    monkeypatch.setattr(Trial, "_rivals", lambda self: list(self.arms))
    auto = AutoDrafter(None)
    found = settled(Pair(*bundled_pair, auto), GREEDY, [[1, 5, 9]], 12)
    assert found.trial.chosen is not None
    assert all(found.trial.tokens_of(arm) >= 48 for arm in auto.arms)


def test_a_benchmark_does_not_try_for_ever(
    bundled_pair: tuple[Any, Any], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers may be too short for anything to count, and nothing may be to be measured."""
    auto = AutoDrafter(None)
    pair = Pair(*bundled_pair, auto)
    assert settled(pair, GREEDY, [[1, 5, 9]], 2).trial.chosen is None
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "0")
    with pytest.raises(InputError, match="found out by measuring, which MLX_DISTILL_CALIBRATE=0"):
        settled(pair, GREEDY, [[1, 5, 9]], 2)


def test_a_shape_that_is_asked_for_is_kept(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, measured: Path
) -> None:
    auto, plan = AutoDrafter(bundled_drafter, "small"), DraftPlan(1, 2, 3)
    responses = stream_generate(*bundled_pair, "Once", drafter=auto, plan=plan, max_tokens=12)
    *_, last = responses
    assert last.verified_tokens == 3 * last.target_calls
    assert not measured.exists()


def test_names(bundled_pair: tuple[Any, Any]) -> None:
    found = load_drafter("auto", *bundled_pair)
    assert isinstance(found, AutoDrafter)
    assert list(found.arms) == [NGRAMS, NOTHING], "the bundled drafter is for eight layers"
    assert isinstance(load_drafter("auto+ngram", *bundled_pair), AutoDrafter)
    with pytest.raises(InputError, match="names no drafter"):
        load_drafter("auto+auto", *bundled_pair)
    assert found.title(NGRAMS) == "n-grams"


def test_generate_tries_unless_something_is_named(
    bundled_once: None, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--max-tokens", "4"]) == 0
    assert "n-grams and plain decoding are tried in turn" in capsys.readouterr().err
    for flags in (["--no-drafter"], ["--draft", "ngram", "--nodes", "4"], ["--nodes", "4"]):
        assert generate.main([*flags, "--max-tokens", "4"]) == 0
        assert "are tried in turn" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learn", "x"], "--learn changes the drafter all the time; leave --draft auto out"),
        (["--nodes", "4"], "--draft auto plans by what is measured; leave shapes of drafts out"),
        (["--draft-model", "x"], "--draft auto takes no --draft-model; name either"),
        (["--no-drafter"], "--draft auto and --no-drafter exclude each other"),
    ],
)
def test_generate_refuses(
    flags: list[str], sentence: str, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--draft", "auto", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("mixed", [False, True])
def test_a_copy_of_texts_promises_nothing(bundled_pair: tuple[Any, Any], mixed: bool) -> None:
    """The text of a calibration repeats itself; what counts is what else is in a mixture."""
    ngrams = NGramDrafter(shortest=PAIR, store_tokens=0)
    drafter = MixedDrafter(NoDrafter(), ngrams) if mixed else ngrams
    config = CalibrationConfig((1, 2), (16,), (1,), (1,), 3, cycles=6)
    ticks = iter(range(10**9))
    costs = calibrate(Pair(*bundled_pair, drafter), config, lambda: float(next(ticks))).costs
    assert (costs.cycle_tokens, costs.sampled_cycle_tokens) == ((1, 1) if mixed else (0, 0))
