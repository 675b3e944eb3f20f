"""The benchmark on chats, and on weights as a GPU loads them."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from half_models import REFERENCE

import mlx_distill
from mlx_distill import InputError, benchmark
from mlx_distill.benchmarking import samplers
from mlx_distill.benchmarking.arms import measure
from mlx_distill.benchmarking.benchmark import usable
from mlx_distill.benchmarking.comparison import first_difference
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.data.prompts import Asked
from mlx_distill.data.report import Report
from mlx_distill.distillation import loss_memory

generate = importlib.import_module("mlx_distill.generate")
TINY = ["--num-prompts", "2", "--max-tokens", "6", "--timed-prompts", "1"]
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<{{ who or 'bot' }}>"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def rows_of(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


# ------------------------------------------------------------------------------------------ chats


def test_chats_are_never_cut(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundled_part: Path,
) -> None:
    """All prompts stay different and ask for an answer; too long ones are counted."""
    model = tmp_path / "model"
    shutil.copytree(bundled_part, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    data = rows_of(tmp_path, ["Tom ran. " * 40, "Who?", "Where?", "When?"])
    asked: list[list[int]] = []

    def run(bench: Any, prompts: list[Asked], *arguments: Any) -> dict[str, Any]:
        asked.extend(one.ids for one in prompts)
        raise InputError("enough")

    monkeypatch.setattr(benchmark, "run", run)
    drafter = REFERENCE
    flags = ["--model", str(model), "--drafter", str(drafter), "--data", str(data)]
    flags += ["--num-prompts", "3", "--prompt-tokens", "24"]
    assert benchmark.main([*flags, "--chat-template-config", '{"who": "Lily"}']) == 2
    assert "4 rows read, 3 prompts kept, 1 dropped" in capsys.readouterr().err
    _, tokenizer = mlx_distill.load(model)
    texts = [tokenizer.decode(ids) for ids in asked]
    assert [text.removeprefix("<s>").strip() for text in texts] == [
        f"<user> {word}?\n<Lily>" for word in ("Who", "Where", "When")
    ]


def test_prompts_that_leave_no_room(bundled_pair: tuple[Any, Any]) -> None:
    model, _ = bundled_pair
    prompts = [Asked([1] * length) for length in (500, 5, 507, 506)]
    report = Report(rows=4)
    config = BenchmarkConfig(num_prompts=2, sweep_prompts=0, max_tokens=6)
    assert usable(model, prompts, config, report) == [prompts[0], prompts[1]]
    assert (report.kept, report.dropped.total()) == (3, 1)
    few = BenchmarkConfig(num_prompts=4, sweep_prompts=0, max_tokens=6)
    with pytest.raises(InputError, match=r"4 prompts were asked for, there are 3 \(1 prompt with"):
        usable(model, prompts, few, Report(rows=4))


# ------------------------------------------------------------------------------------- half types


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Keep drafters of the tiny models between the tests."""
    return {}


@pytest.fixture
def tiny_pair(
    tiny_on_a_gpu: Path, tmp_path_factory: pytest.TempPathFactory, drafters: dict[str, Path]
) -> list[str]:
    """Return the flags of a tiny model as a GPU loads it, and of a drafter for it."""
    name = tiny_on_a_gpu.name
    if name not in drafters:
        output = tmp_path_factory.mktemp("drafter") / name
        sizes = ["--exit-dim", "16", "--draft-vocab-size", "64", "--unroll", "2", "--steps", "1"]
        counts = ["--max-tokens", "6", "--held-out", "1", "--max-prompts", "4", "--quiet"]
        flags = ["--data", str(benchmark.PROMPTS), "--output", str(output), *sizes, *counts]
        from mlx_distill import train_drafter

        assert train_drafter.main(["--model", str(tiny_on_a_gpu), *flags]) == 0
        drafters[name] = output
    return ["--model", str(tiny_on_a_gpu), "--drafter", str(drafters[name])]


@pytest.mark.usefixtures("not_compiled")
def test_benchmark_on_weights_as_a_gpu_loads_them(
    tiny_pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    assert benchmark.main([*tiny_pair, *TINY, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["dtype"] in ("float16", "bfloat16")
    assert result["equal_texts"] + len(result["differences"]) == 2
    for one in result["differences"]:
        assert one["margin"] < 0.1
    assert "A cycle takes" in capsys.readouterr().out


@pytest.mark.usefixtures("not_compiled")
def test_generate_on_weights_as_a_gpu_loads_them(
    tiny_pair: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "WARM_UP", 4)
    flags = ["--max-tokens", "8", "--compare", "--json"]
    for more in ([], ["--temp", "1", "--seed", "1"]):
        assert generate.main([*tiny_pair, *flags, *more]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["drafted_tokens"] > 0
        margin = found["comparison"]["margin"]
        assert margin is None or margin < 0.1


@pytest.mark.parametrize(("drafted", "calls"), [([0, 1, 1, 0, 1], 2), ([0, 1, 1, 0], 1)])
def test_calls_of_a_text_that_ends_within_a_draft(drafted: list[int], calls: int) -> None:
    """mlx-lm does not count its calls; the one that ends a text may bring drafted tokens alone."""
    steps = [SimpleNamespace(token=0, from_draft=bool(one)) for one in drafted]
    assert measure(lambda prompt, seed: iter(steps), [1], 0).target_calls == calls


def test_where_texts_part() -> None:
    rows = [[0.0, 2.0, 0.5], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    steps = [
        SimpleNamespace(token=token, logprobs=mx.array(row).astype(mx.bfloat16))
        for token, row in zip((1, 0, 2), rows, strict=True)
    ]
    assert first_difference(steps, [1, 0, 2]) is None
    found = first_difference(steps, [1, 2, 2])
    assert found is not None
    assert (found.place, found.margin) == (1, 2.0)
    shorter = first_difference(steps, [1, 0])
    assert shorter is not None
    assert (shorter.place, shorter.margin) == (2, 1.0)


# ----------------------------------------------------------------------------------------- others


def test_loss_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More entries than 16 bits count, and more tokens than a chunk has."""
    monkeypatch.setattr(benchmark, "loss_memory", partial(benchmark.loss_memory, width=8))
    monkeypatch.setattr(loss_memory, "chunk_rows", lambda entries: 8)
    output = tmp_path / "memory.json"
    assert benchmark.main(["--loss-memory", "20", "70000", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["chunked_bytes"] < found["whole_bytes"]
    assert found["gradient_difference"] < 1e-4
    assert "20 tokens x 70,000 entries" in capsys.readouterr().out


@pytest.mark.usefixtures("not_compiled")
def test_samplers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "ROUNDS", 1)
    output = tmp_path / "samplers.json"
    assert benchmark.main(["--samplers", "2", "5000", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["samplers"]
    assert [row["law"] for row in found[:2]] == [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.95},
    ]
    assert all(row[name] > 0 for row in found for name in ("mlx_lm_ms", "sorted_ms", "ours_ms"))
    shown = capsys.readouterr().out
    assert "2 rows of 5,000 entries" in shown
    assert "temperature 0.7, top_p 0.9, top_k 50" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loss-memory 0 5", "loss_memory must be at least 1, got 0"),
        ("--loss-memory 1000000000 1000000", "takes about 16,000,000 GB, this machine has"),
        ("--samplers 8 0", "samplers must be at least 1, got 0"),
        ("--samplers 1000000000 1000000", "takes about 16,000,000 GB, this machine has"),
        ("--samplers 8 9 --report r.html", "no batches, dispatches, memory or samplers"),
        ("--batch 4 0", "batch must be at least 1, got 0"),
        ("--batch 4 --temp 1", "--batch measures greedy texts; leave out --temp"),
        ("--num-draft-tokens 1000000000000", "num_draft_tokens must be between 1 and 64"),
        ("--sweep-widths 1 1000000000000", "sweep_widths must be between 1 and 256"),
        ("--sweep-lengths 0", "sweep_lengths must be at least 1, got 0"),
        ("--prompt-tokens 0", "prompt_tokens must be at least 1, got 0"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--chat-template-config [", "--chat-template-config is not JSON"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], flags: str, sentence: str) -> None:
    assert benchmark.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert sentence in err
