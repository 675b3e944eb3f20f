"""The profile: parts of a cycle, their trace, and what a machine could do at most."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_models import tiny_model

from mlx_distill import benchmark, cli
from mlx_distill.benchmarking import roofline
from mlx_distill.benchmarking.roofline import Ceilings, Work, of_call
from mlx_distill.speculation.phases import PHASES, PhaseClock, phase, watching

TINY = ["--num-prompts", "1", "--max-tokens", "12", "--timed-prompts", "1", "--profile"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(roofline, "LARGEST", 256)


# -------------------------------------------------------------------------------------- the marks


def test_a_mark_that_nobody_watches_does_nothing() -> None:
    lazy = mx.array(1) + 1
    with phase("draft", lazy) as made:
        made(lazy)
    clock = PhaseClock(waits=False)
    with watching(clock):
        with phase("draft") as made:
            made(lazy)
        with phase("tree"):
            pass
    with phase("walk"):
        pass
    assert [one.name for one in clock.slices] == ["draft", "tree"]


def test_a_clock_waits_for_what_parts_need_and_made(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[list[mx.array]] = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: awaited.append(list(arrays[0])))
    needed, made_there = mx.array(1), mx.array(2)
    for waits in (False, True):
        with watching(PhaseClock(waits)), phase("draft", [needed], None) as made:
            made((made_there, {"never": 1}.get("x")))
    assert awaited == [[needed], [made_there]]


# -------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("law", [[], ["--temp", "1"], ["--tree", "beam"]])
def test_the_command(
    tmp_path: Path,
    law: list[str],
    whole_pair: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "load_model", lambda arguments: whole_pair)
    output, traced = tmp_path / "profile.json", tmp_path / "trace.json"
    files = ["--output", str(output), "--trace", str(traced)]
    assert benchmark.main([*TINY, *law, *files]) == 0
    found = json.loads(output.read_text())
    assert {"commit", "machine", "versions", "config"} <= set(found)
    parts = {row["part"]: row for row in found["parts"]}
    assert list(parts) == [*PHASES, "host"]
    assert all(0 <= row["waiting_ms"] <= row["ms"] for row in parts.values())
    assert all(parts[name]["dispatches"] > 0 for name in PHASES)
    assert sum(row["ms"] for row in parts.values()) == pytest.approx(found["waited_cycle_ms"], 0.5)
    assert parts["target"]["bytes"] > found["plain_step"]["bytes"] / 2 > 0
    assert parts["tree"]["reached"] is None
    assert found["ceilings"]["flops_per_s"] > 0
    assert "plain step of mlx-lm" in capsys.readouterr().out
    trace = json.loads(traced.read_text(), parse_constant=pytest.fail)  # no NaN: it is no JSON
    check_format(trace)
    check_trace(trace)


def check_format(trace: dict[str, Any]) -> None:
    """Every event is what the trace event format says of its phase; see its sections 1 and 2."""
    assert trace.keys() == {"displayTimeUnit", "traceEvents"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    latest: dict[tuple[int, int], float] = {}
    named: set[tuple[str, int]] = set()
    for event in trace["traceEvents"]:
        place = event["pid"], event["tid"]
        assert all(type(number) is int for number in place)
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event.keys() == {"name", "ph", "pid", "tid", "args"}
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            assert place not in latest, "what is named is named before its slices"
            assert (event["name"], place[0]) not in named, "and once"
            named.add((event["name"], place[0]))
            continue
        assert event["ph"] == "X"
        assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert isinstance(event["name"], str)
        assert isinstance(event["cat"], str)
        assert event["ts"] >= latest.get(place, 0.0)
        assert event["dur"] >= 0
        latest[place] = event["ts"]
    assert {pid for pid, _ in latest} == {1, 2} == {pid for _, pid in named}
    assert len(named) == 4


def check_trace(trace: dict[str, Any]) -> None:
    """Every slice lies within the one that it overlaps, as viewers ask for."""
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    for process in (1, 2):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert {*PHASES, "host", "waiting"} <= {event["name"] for event in slices}
        open_until: list[float] = []
        for event in slices:
            start, end = event["ts"], event["ts"] + event["dur"]
            while open_until and open_until[-1] <= start + 1e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3
            open_until.append(end)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trace", "t.json"], "--trace writes what --profile times"),
        (["--profile", "--trace", "."], "the output . is no name of a new"),
        (["--profile", "--trace", "nowhere/t.json"], "its folder does not exist"),
    ],
)
def test_refused(
    flags: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(flags) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- the ceilings


@pytest.mark.parametrize("tied", [True, False])
def test_work_of_a_call_counted_by_hand(tied: bool) -> None:
    """Each weight is read once per call, but of an embedding only the rows' entries."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = tiny_model("llama", **sizes, **heads, tie_word_embeddings=tied)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    weights = 2 * layer + 32 + 50 * 32
    cache, attention = 2 * 2 * 100 * 16, 2 * 4 * 3 * 100 * 32
    assert of_call(model, 3, 100) == Work(4.0 * (weights + cache), 2 * 3 * weights + attention)


def test_only_the_experts_that_are_asked_are_read() -> None:
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=2)
    one, two, many = (of_call(model, rows, 1).bytes for rows in (1, 2, 64))
    assert two > one
    assert many == of_call(model, 4, 1).bytes


def test_ceilings_are_what_takes_longer() -> None:
    ceilings = Ceilings("float32", 2e9, 1e9, 1e12)
    assert Work(4e9, 1e12).ceiling_ms(ceilings) == 2000
    assert Work(1e9, 1e12).ceiling_ms(ceilings) == 1000
