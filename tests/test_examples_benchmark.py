"""The benchmark for Macs: precisions, its estimate, going on where it was, and what it refuses."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from conftest import REPOSITORY
from half_models import REFERENCE

import mlx_distill
from mlx_distill import InputError, benchmark, machine
from mlx_distill.benchmarking import arms, roofline, studies
from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench, Sample
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.precisions import PRECISIONS, in_precision
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.target.target import Target

SIZES = ["--num-prompts", "1", "--sweep-prompts", "1", "--max-tokens", "3", "--growth", "128"]
SMALL = [*SIZES, "--widths", "2", "--lengths", "2", "--warm-up", "0", "--cool-down", "0"]
NAMES = ["fp16-T0-planned", "fp16-T0-beams"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = REPOSITORY / "examples" / "benchmark_m2_ultra.py"
    spec = importlib.util.spec_from_file_location("benchmark_m2_ultra", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(folder: Path, *more: str) -> list[str]:
    laws = ["--precisions", "fp16", "--temperatures", "0"]
    return ["--output", str(folder), *laws, *SMALL, *more]


def test_it_runs_small_and_goes_on(
    example: ModuleType,
    bundled_part: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(roofline, "LARGEST", 256)
    monkeypatch.setattr(studies, "GROWTH_TOKENS", 4)
    monkeypatch.setattr(studies, "GROWTH_RUNS", 1)
    monkeypatch.setattr(studies, "SHARING_SHAPES", ((5, 4), (10, 4)))
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "0")
    folder = tmp_path / "run"
    pair = ["--model", str(bundled_part), "--drafter", str(REFERENCE)]
    assert example.main(flags(folder, *pair)) == 0
    out = capsys.readouterr().out
    assert "2 benchmarks, about " in out
    assert (folder / "report.html").exists()
    planned, beams = (json.loads((folder / f"{name}.json").read_text()) for name in NAMES)
    assert (planned["config"]["tree"], beams["config"]["tree"]) == (None, "beam")
    assert planned["growth"]
    assert planned["trees"]
    assert {"os", "power", "processor", "memory_bytes"} <= set(planned["machine"])
    kept = (folder / f"{NAMES[0]}.json").read_bytes()
    for name in (f"{NAMES[1]}.json", "report.html"):
        (folder / name).unlink()
    assert example.main(flags(folder, *pair)) == 0
    assert "1 benchmarks, about " in capsys.readouterr().out
    assert (folder / f"{NAMES[0]}.json").read_bytes() == kept
    assert (folder / "report.html").exists()


def test_every_benchmark_once(example: ModuleType, tmp_path: Path) -> None:
    """The second of a name could not be written, for the first had been."""
    asked = example._parser().parse_args([*flags(tmp_path), "--temperatures", "0", "1", "0.0"])
    names = [step.name for step in example._steps(asked, "fp16", tmp_path)]
    assert names == [*NAMES, "fp16-T1-planned", "fp16-T1-beams"]


def test_damaged_settings(example: ModuleType, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "settings.json").write_bytes(b"\xff\xfe")
    assert example.main(flags(tmp_path)) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.fixture
def folder_of_a_run(example: ModuleType, tmp_path: Path, monkeypatch: Any) -> Path:
    """Return a folder in which a run failed at its first benchmark."""
    folder = tmp_path / "run"
    monkeypatch.setattr(example, "in_precision", lambda *_: bundled("stories-14m"))
    monkeypatch.setattr(example.benchmark, "main", lambda argv: 2)
    assert example.main(flags(folder)) == 2
    return folder


def test_what_is_refused(
    example: ModuleType, folder_of_a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, folder, sentence in [
        (["--max-tokens", "4"], folder_of_a_run, "holds a run with other settings"),
        ([], folder_of_a_run, "fp16-T0-planned could not be measured; what was, is kept"),
        (["--model", "m"], folder_of_a_run, "needs a drafter"),
        ([], folder_of_a_run / "settings.json", "settings.json"),
    ]:
        assert example.main(flags(folder, *more)) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--cool-down", "-1"], "cool_down must be at least 0, got -1"),
        (["--cool-down", "nan"], "cool_down must be"),
        (["--warm-up", "-1"], "warm_up_s must be at least 0"),
        (["--num-prompts", "0"], "num_prompts must be at least 1, got 0"),
        (["--num-prompts", "99"], "99 prompts were asked for"),
        (["--max-tokens", "1"], "max_tokens must be at least 2"),
        (["--sweep-prompts", "-1"], "sweep_prompts must be at least 0"),
        (["--widths", "0"], "sweep_widths must be"),
        (["--growth", "0"], "growth must be at least 1"),
        (["--temperatures", "0", "-1"], "temperatures must be"),
        (["--data", "/nowhere"], "there is no file /nowhere"),
        (["--drafter", "ngram+/nowhere"], "/nowhere"),
        (["--draft-model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_converted(
    more: list[str],
    sentence: str,
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A negative pause ended in a traceback, and the others after minutes of converting."""
    assert example.main(flags(tmp_path / "run", *more)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "a minute"), (125, "2 min"), (3 * 3600 + 600, "3 h 10 min")]
)
def test_durations_in_words(example: ModuleType, seconds: float, said: str) -> None:
    assert example._duration(seconds) == said


# ----------------------------------------------------------------------------------- its libraries


SOURCE = str(bundled("stories-4m"))


@pytest.fixture(scope="module")
def as_it_was() -> tuple[mx.array, mx.array]:
    """Return a text, and the distributions in which the original reads it."""
    model, tokenizer = mlx_distill.load(SOURCE)
    ids = mx.array([tokenizer.encode("Once upon a time there was")])
    return ids, distributions(model, ids)


def distributions(model: Any, ids: mx.array) -> mx.array:
    return mx.softmax(Target.of(model).read(ids)[0].astype(mx.float32), axis=-1)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "as-is"])
def test_precisions(precision: str, tmp_path: Path, as_it_was: tuple[mx.array, mx.array]) -> None:
    """A converted model reads text as the original does, as far as its precision goes."""
    folder = in_precision(SOURCE, precision, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"stories-4m-{precision}"]
    assert in_precision(SOURCE, precision, tmp_path) == folder
    after, _ = mlx_distill.load(folder)
    ids, expected = as_it_was
    found = distributions(after, ids)
    assert mx.abs(expected - found).sum(axis=-1).mean().item() < (0.6 if "4" in precision else 0.1)
    quantised = any("scales" in module for module in after.modules())
    assert quantised == (precision != "fp16")
    if quantised:
        with pytest.raises(InputError, match="is quantised already"):
            in_precision(str(folder), "4-bit", tmp_path / "again")


def test_a_model_as_it_is(tmp_path: Path) -> None:
    assert in_precision("some/name", "as-is", tmp_path) == Path("some/name")


def test_a_model_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for on the hub, under a name that there is not."""
    monkeypatch.setenv("HOME", str(Path(SOURCE).parent))
    folder = in_precision(f"~/{Path(SOURCE).name}", "fp16", tmp_path)
    assert (folder / "model.safetensors").exists()


def test_arms_warm_up_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called, a_sample = iter(range(100)), [], Sample([1], 1.0, 1.0, 1.0, 1, 1)
    monkeypatch.setattr(arms.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        arms, "measure", lambda decode, prompt, seed: called.append(decode) or a_sample
    )
    monkeypatch.setattr(Bench, "arms", lambda self, plan: {PLAIN: "plain", OURS: "ours"})
    bench = Bench.__new__(Bench)
    bench.config = BenchmarkConfig(num_prompts=1, warm_up_s=3.0)
    bench.run([[1]], DraftPlan(), "")
    assert len(called) == 2 * 3 + 2


PMSET = {
    ("pmset", "-g", "batt"): "Now drawing from 'AC Power'\n -InternalBattery-0 100%\n",
    ("pmset", "-g"): "System-wide power settings:\n lowpowermode         1\n sleep  0 (x)\n",
}


def test_power_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, PMSET[command], "")

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.power() == "AC Power, lowpowermode 1"

    def fails(command: tuple[str, ...], **options: Any) -> Any:
        raise FileNotFoundError("pmset")

    monkeypatch.setattr(machine.subprocess, "run", fails)
    assert machine.power() is None
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.power() is None


def test_the_command_refuses_a_long_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--warm-up-s", "-1"]) == 2
    assert "warm_up_s must be at least 0" in capsys.readouterr().err
