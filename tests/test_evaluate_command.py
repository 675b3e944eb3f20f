"""The command ``evaluate``."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from evaluating import BUNDLED, STORIES, tiny_folder

from mlx_distill import checkpoint
from mlx_distill import evaluate as verb
from mlx_distill.checkpoint import load
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.evaluation.evaluation import EvaluationConfig, measure
from mlx_distill.evaluation.models import Loaded
from mlx_distill.target.target import Target

pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "valid.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return path


def run(*arguments: Any) -> int:
    return verb.main([str(argument) for argument in arguments])


def test_command(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "qa.jsonl"
    asked.write_text('{"question": "Who ran?", "answer": "Tom"}\n' * 2)
    output = tmp_path / "out.json"
    students = [f"plain={folders['b']}", f"same={folders['a']}"]
    status = run(
        *("--teacher", folders["a"], "--student", *students, "--data", data, "--qa", asked),
        *("--bootstrap", 50, "--speed-tokens", 4, "--max-length", 16, "--json", "--output", output),
    )
    assert status == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(output.read_text())
    for word in ("perplexity", "gap closed", "F1", "tokens/s", "teacher", "plain", "4 texts"):
        assert word in out
    rows = found["models"]
    assert list(rows) == ["teacher", "plain", "same"]
    assert rows["same"]["kl"]["value"] == 0
    assert rows["same"]["gap_closed"]["value"] in (1, None)
    for row in rows.values():
        assert row["texts"] == 4
        assert row["questions"] == 2
        assert row["exact_match"]["value"] == 0
        assert row["tokens_per_s"] > 0
        assert row["parameters"] * 4 == row["weights_bytes"]
        low, high = row["perplexity"]["interval"]
        assert low <= row["perplexity"]["value"] <= high
    size = (folders["a"] / "model.safetensors").stat().st_size
    assert rows["teacher"]["file_bytes"] == size
    assert found["config"]["bootstrap"] == 50
    assert {"mlx", "mlx-lm"} <= set(found["versions"])
    assert "processor" in found["machine"]


def test_models_that_read_other_tokens(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokenizer, and a shorter context: it was said that the tokenizers differ."""
    shutil.copytree(BUNDLED, tmp_path / "short")
    settings = tmp_path / "short" / "config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"max_position_embeddings": 5})
    )
    students = [f"whole={BUNDLED}", f"short={tmp_path / 'short'}"]
    assert run("--student", *students, "--data", data, "--speed-tokens", 0, "--bootstrap", 0) == 0
    out = capsys.readouterr().out
    assert "4 texts with 16 or " in out
    assert "The models read other tokens, by their tokenizers or contexts" in out


def test_command_alone_on_the_bundled_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", data, "--max-texts", 3, "--speed-tokens", 0, "--json"]
    assert run("--student", f"stories={BUNDLED}", *arguments) == 0
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])["models"]["stories"]
    assert row["texts"] == 3
    assert 2 < row["perplexity"]["value"] < 60
    assert not {"kl", "agreement", "gap_closed", "tokens_per_s", "f1"} & set(row)
    assert "  perplexity " in out
    assert "  KL" not in out


def test_command_on_weights_as_a_gpu_loads_them(
    tiny_on_a_gpu: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "qa.jsonl"
    asked.write_text('{"question": "Who ran?", "answer": "Tom"}')
    flags = ["--data", data, "--qa", asked, "--speed-tokens", 2, "--json", "--bootstrap", 9]
    assert run("--teacher", tiny_on_a_gpu, "--student", f"s={tiny_on_a_gpu}", *flags) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert rows["s"]["kl"]["value"] == 0
    assert rows["s"]["parameters"] * 4 > rows["s"]["weights_bytes"]
    model, _ = checkpoint.load(tiny_on_a_gpu)
    model.set_dtype(mx.float32)
    wide = Loaded(model, load(tiny_on_a_gpu)[1], str(tiny_on_a_gpu))
    expected = measure({"s": wide}, data, EvaluationConfig(speed_tokens=0, bootstrap=0))["s"]
    for name, tolerance in (("nats_per_token", 2e-3), ("calibration_error", 0.02)):
        found = rows["s"][name]["value"]
        assert found == pytest.approx(expected[name]["value"], rel=tolerance, abs=tolerance)


def test_a_drafter_is_judged_on_weights_as_a_gpu_loads_them(
    tiny_on_a_gpu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure is a number, and no draft costs a call."""
    model, tokenizer = load(tiny_on_a_gpu)
    mx.random.seed(0)
    network = RecurrentDrafter(RecurrentDrafterConfig(64, 4096, 32, 1, draft_vocab_size=64))
    save_drafter(tmp_path / "d", network, fingerprint(Target.of(model), tokenizer), {})
    rows = [json.dumps({"prompt": text}) + "\n" for text in ("Once upon a time", "One day")]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    files = ["--drafter", tmp_path / "d", "--data", tmp_path / "prompts.jsonl"]
    sizes = ["--answer-tokens", 6, "--nodes", 4, "--chains", 2, "--rounds", 0, "--json"]
    assert run("--teacher", tiny_on_a_gpu, *files, *sizes) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for figures in found["temperatures"].values():
        for shape in figures["shapes"].values():
            assert 1 <= shape["all"]["tokens_per_call"] <= 5


def test_stored_answers_are_filtered_and_a_cut_one_has_no_end(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Who ran?", "completion": "Tom ran home.", "finish_reason": end}
        for end in ("stop", "length")
    ]
    file = tmp_path / "stored.jsonl"
    counts = []
    for row in rows:
        file.write_text(json.dumps(row) + "\n")
        flags = ["--data", file, "--data-layout", "completions", "--no-drop-truncated", "--json"]
        assert run("--student", f"a={folders['a']}", *flags, "--speed-tokens", 0) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["a"]
        counts.append(figures["tokens"])
    assert counts[0] == counts[1] + 1  # the end
    assert run("--student", f"a={folders['a']}", *flags[:4]) == 2
    assert "truncated" in capsys.readouterr().err


def test_adapters_by_name(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_a": (64, 2), "lora_b": (2, 64)}
    prefix = "model.layers.2.self_attn.q_proj"
    weights = {f"{prefix}.{name}": mx.random.normal(shape) for name, shape in shapes.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    students = [f"{name}={folders['a']}" for name in ("plain", "tuned")]
    flags = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0, "--json"]
    adapter = ["--adapter-path", f"tuned={tmp_path}"]
    assert run("--teacher", folders["a"], "--student", *students, *flags, *adapter) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert rows["plain"]["kl"]["value"] == 0
    assert rows["tuned"]["kl"]["value"] > 0


def test_names_are_no_markup(
    folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--student", f"[/x][bold]={folders['a']}", *flags) == 0
    assert "[/x][bold]" in capsys.readouterr().out


def test_command_says_what_it_cuts(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny_folder(tmp_path / "wide", 0, 4128)
    students = [f"wide={wide}", f"narrow={folders['c']}"]
    arguments = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--teacher", folders["a"], "--student", *students, *arguments) == 0
    err = capsys.readouterr().err
    assert err.count("teacher 4096, wide 4128, narrow 4096); all are cut to 4096") == 1
    assert err.count("texts are cut to 256 tokens") == 1


def test_differing_tokenizers(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["b"], other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<more>"]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--teacher", folders["a"], "--student", f"s={other}", *arguments) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "perplexity per token is not comparable" in sentence
    assert "with no --teacher" in sentence
    assert run("--student", f"s={other}", f"t={folders['a']}", *arguments) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--data {data}", "no model to evaluate; name one with --student NAME=DIR"),
        ("--student {a} --data {data}", "--student takes NAME=DIR, got"),
        ("--student s={a} s={b} --data {data}", "two models are called s"),
        ("--teacher {a} --student teacher={b} --data {data}", "two models are called teacher"),
        ("--student s={a} --data {data}.no", "there is no file"),
        ("--student s={a} --data {data} --qa {data}.no", "cannot be read"),
        ("--student s={a}-no --data {data}", "there is no folder"),
        ("--student s={a} --data {data} --output {data}", "exists; name another"),
        ("--student s={a} --data {data} --output {data}/no/x", "its folder does not exist"),
        ("--student s={a} --data {data} --batch-size 0", "batch_size must be at least 1, got 0"),
        ("--student s={a} --data {data} --max-texts 0", "max_texts must be at least 1, got 0"),
        ("--student s={a} --data {data} --speed-tokens 1", "speed_tokens must be 0, or between 2"),
        ("--student s={a} --data {data} --seed -1", "seed must be at least 0"),
        (
            "--student s={a} --data {data} --bootstrap 1000000000000",
            "bootstrap must be between 0 and 1,000,000",
        ),
        ("--student s={a} --data {data} --qa-tokens 0", "qa_tokens must be at least 1, got 0"),
        ("--student s={a} --data {data} --adapter-path t={b}", "takes each of s once, got t"),
        ("--student s={a} --data {data} --adapter-path {b}", "--adapter-path takes NAME=DIR"),
        ("--student s={a} --data {data} --chat-template-config 1", "must be a JSON object"),
        ("--drafter {b} --data {data} --bootstrap 5", "target's answers; leave --bootstrap out"),
        ("--drafter {b} --data {data} --data-layout completions", "leave --data-layout out"),
        ("--student s={a} --data {data} --nodes 4", "a --drafter is judged; leave --nodes out"),
        ("--student s={a} --data {data} --qa-tokens 4", "without --qa; leave --qa-tokens out"),
        ("--student s={a} --data {data} --where x==1", "is filtered; leave --where out"),
        ("--student s={a} --data {data} --no-drop-refusals", "leave --drop-refusals out"),
    ],
)
def test_refused(
    folders: dict[str, Path],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    places = {"a": folders["a"], "b": folders["b"], "data": data}
    assert run(*arguments.format(**places).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert sentence in err


def test_arguments_of_no_template(
    folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(data), "--chat-template-config", '{"enable_thinking": false}']
    assert run("--student", f"s={folders['a']}", *flags) == 2
    sentence = "--chat-template-config needs a tokenizer with a chat template; this has none"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"
