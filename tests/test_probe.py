"""The probe of kernels: right and faster, or not used; what is kept of it, and shown."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill import InputError, calibrate, load_drafter
from mlx_distill.calibration import kernels, store
from mlx_distill.calibration.measuring import Calibration
from mlx_distill.calibration.pair import Pair
from mlx_distill.kernels.choice import OPERATIONS, VARIABLE, Case, Operation, chosen, trust
from mlx_distill.kernels.probe import COMPARED, Verdict, probe, trusted
from mlx_distill.speculation.costs import Costs
from mlx_distill.target.joined_layers import NAMES

COSTS = Costs((128,), (1, 2), ((0.01, 0.02),), (1,), (1,), ((0.001,),))
SHAPE = Case("in use", (mx.array([1.0, 2.0]),), {})


class Clock:
    """Tells the time that kernels say they took."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def operation(clock: Clock, wrong: float | None, kernel_s: float) -> Operation[..., Any]:
    """Return one whose kernel is right up to the number ``wrong``."""

    def kernel(x: mx.array) -> mx.array:
        clock.now += kernel_s
        if wrong is None:
            raise RuntimeError("no such instruction\nand more")
        return 2 * mx.where(x == wrong, 0, x)

    def twin(x: mx.array) -> mx.array:
        clock.now += 1.0
        return 2 * x

    def cases(seed: int) -> Iterator[Case]:
        for number in range(10**6):
            yield Case(f"case {number}", (mx.array([100.0 + number]),), {})

    def differ(case: Case, found: mx.array, expected: mx.array) -> str:
        return "" if mx.array_equal(found, expected).item() else f"off at {case.name}"

    made = Operation("double", kernel, twin, cases, differ)
    del OPERATIONS["double"]
    return made


@pytest.mark.parametrize(
    ("wrong", "kernel_s", "used", "fault"),
    [
        (-1.0, 0.5, True, ""),
        (-1.0, 1.0, False, ""),
        (2.0, 0.5, False, "off at in use"),
        (100.0 + COMPARED - 1, 0.5, False, f"off at case {COMPARED - 1}"),
        (None, 0.5, False, "it does not run: no such instruction"),
    ],
)
def test_a_kernel_is_used_where_it_is_right_and_faster(
    clock: Clock, wrong: float | None, kernel_s: float, used: bool, fault: str
) -> None:
    verdict = probe(operation(clock, wrong, kernel_s), [SHAPE], clock=clock)
    assert (verdict.used, verdict.fault) == (used, fault)
    if not fault:
        assert verdict.kernel_s == pytest.approx(kernel_s)
        assert verdict.twin_s == pytest.approx(1.0)


def test_a_kernel_that_nothing_asks_for_is_not_used(clock: Clock) -> None:
    assert not probe(operation(clock, -1.0, 0.1), [], clock=clock).used


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> Pair:
    model, tokenizer = bundled_pair
    return Pair(model, tokenizer, load_drafter("ngram", model, tokenizer))


def test_shapes_in_use_are_those_of_a_trees_call(pair: Pair) -> None:
    found = kernels.in_use(pair, 32)
    assert {"few_rows", "tree_rope", "tree_attention", *NAMES} <= set(found)
    for case in found["few_rows"]:
        assert 1 < case.args[0].shape[0] <= 16


def test_what_is_asked_for_can_be_compared(pair: Pair) -> None:
    for name, cases in kernels.in_use(pair, 32).items():
        operation = OPERATIONS[name]
        for case in cases:
            twin = operation.tried(operation.twin, case)
            assert operation.differ(case, twin, twin) == ""


def test_a_wrong_kernel_is_named_in_one_line_and_not_used(
    pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "has_gpu", lambda: True)
    monkeypatch.setattr("mlx_distill.kernels.choice.has_gpu", lambda: True)
    monkeypatch.setattr(kernels, "in_use", lambda pair, context: {"double": [SHAPE]})
    for wrong in (2.0, -1.0):
        made = operation(clock, wrong, 0.5)
        monkeypatch.setattr(kernels, "operations", lambda made=made: {"double": made})
        kernels.probe_kernels(pair, 32, clock)
        said = capsys.readouterr().err
        assert (said.count("\n"), "double is not right here" in said) == (wrong > 0, wrong > 0)
        assert chosen("double") == (wrong < 0)
    monkeypatch.setenv(VARIABLE, "off")
    assert not kernels.probe_kernels(pair, 32, clock)
    assert not chosen("double")
    trust({})


def test_another_word_for_how_kernels_are_chosen_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "maybe")
    with pytest.raises(InputError, match="MLX_DISTILL_KERNELS must be off, probe or force, got"):
        chosen("double")


def test_what_was_found_is_kept_and_shown(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = store.identity(pair)
    verdicts = [Verdict("walk", "", 1e-6, 2e-6), Verdict("sampler", "it is off", 0.0, 0.0)]
    arguments = ["--model", "stories-14m", "--drafter", "ngram", "--show"]
    monkeypatch.setattr(calibrate, "_pair", lambda *_: pair)
    assert calibrate.main(arguments) == 2
    assert "nothing is kept" in capsys.readouterr().err
    store.keep(known, Calibration(COSTS, {}, verdicts))
    assert store.find_kernels(known) == verdicts
    assert trusted(verdicts) == {"walk": True, "sampler": False}
    assert calibrate.main(arguments) == 0
    said = capsys.readouterr().out
    assert "walk" in said
    assert "it is off" in said


@pytest.mark.parametrize(
    "kernels",
    [
        3,
        ["walk"],
        [{"name": "walk"}],
        [{"name": "walk", "fault": None, "kernel_s": 1e-6, "twin_s": 2e-6}],
        [{"name": "walk", "fault": "", "kernel_s": "1e-6", "twin_s": 2e-6}],
        [{"name": ["walk"], "fault": "", "kernel_s": 1e-6, "twin_s": 2e-6}],
        [{"name": "walk", "fault": "", "kernel_s": 1e-6, "twin_s": 2e-6, "else": 1}],
    ],
)
def test_no_kernel_is_trusted_by_a_damaged_file(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernels: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = store.identity(pair)
    store.remember(known, "calibration", {"costs": COSTS.to_dict(), "kernels": kernels})
    assert not trusted(store.find_kernels(known))
