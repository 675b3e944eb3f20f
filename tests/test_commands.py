"""Every command from its arguments to its last line, with tiny settings."""

import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from commanding import WHOLE
from conftest import REPOSITORY
from test_generate_runs import generate

import mlx_distill
from mlx_distill import (
    cli,
    train_drafter,
)
from mlx_distill.checkpoint import bundled

pytestmark = pytest.mark.usefixtures("bundled_once")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --------------------------------------------------------------------------------- train_drafter


def test_train_drafter_makes_a_drafter_that_generates(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], expected: str
) -> None:
    output = tmp_path / "drafter"
    arguments = ["--data", str(prompts), "--output", str(output), "--quiet"]
    sizes = ["--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "3", "--batch-size", "2"]
    length = ["--max-tokens", "8", "--prompt-tokens", "6", "--held-out", "2", "--steps", "3"]
    assert train_drafter.main([*arguments, *sizes, *length, "--temperatures", "0", "0.7"]) == 0
    out, err = capsys.readouterr()
    assert str(output) in out
    assert "memory: about" in err
    files = {file.name for file in output.iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md", "training.json"}
    assert not output.with_name("drafter.partial").exists()
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "recurrent_drafter"
    assert (config["hidden_size"], config["exit_dim"], config["draft_vocab_size"]) == (384, 32, 256)
    assert set(config["target"]) == {"hidden_size", "vocab_size", "tokenizer_hash"}
    training = json.loads((output / "training.json").read_text())
    assert training["log"][-1]["step"] == 3
    assert len(training["log"][-1]["acceptance_greedy"]) == 3
    assert training["config"]["responses"]["temperatures"] == [0.0, 0.7]
    card = (output / "README.md").read_text()
    assert "prompts.jsonl" in card
    assert "licence" in card
    responses = (tmp_path / "drafter.responses.jsonl").read_text().splitlines()
    assert len(responses) == 1 + 8
    assert all(len(json.loads(row)["prompt"]) <= 6 for row in responses[1:])
    assert generate.main(["--drafter", str(output), "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == expected + "\n"


# ------------------------------------------------------------------------------------------- cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_explains_every_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m mlx_distill.{verb}" in text
    flags = re.split(r"\n  (?=-)", text)[1:]
    assert len(flags) > 10
    for flag in flags:
        names, told = re.split(r"\n +| {2,}", flag.split("\n\n")[0], maxsplit=1)
        if re.search("INT|FLOAT|TOKENS", names):
            assert re.search(r"at least|between|above|at most|\d to \d|\d or \d|\d on", told), told
            assert re.search(r"default|Without", told) or "..." in names, told


def test_flags_keep_mlx_lms_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    kept = "model prompt max-tokens temp top-p min-p top-k seed system-prompt max-kv-size kv-bits"
    more = "ignore-chat-template chat-template-config trust-remote-code kv-group-size"
    last = "quantized-kv-start extra-eos-token prefill-response"
    assert {f"--{name}" for name in f"{kept} {more} {last}".split()} <= flags


def test_console_script(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    assert cli.main(["generate", "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "train_drafter" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["dance"])
    assert end.value.code == 2


def test_module_from_another_folder(tmp_path: Path) -> None:
    """The bundled pair is found, and nothing but the text is on stdout."""
    command = [sys.executable, "-m", "mlx_distill.generate", "--max-tokens", "12"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(WHOLE)
    assert run.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


PRINTS = """
import sys
from mlx_distill import InputError, cli

@cli.command
def main(argv):
    print("found")
    if argv:
        raise InputError(argv[0])
    return 0

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize(
    ("more", "sentence"),
    [([], "the output could not be written: No space left on device"), (["no"], "no")],
)
def test_output_that_finds_no_room(more: list[str], sentence: str) -> None:
    """Python found that out when it ended, in its own words and with a status of 120."""
    command = [sys.executable, "-c", PRINTS, *more]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert run.returncode == 2
    assert run.stderr.endswith(f"error: {sentence}\n")


def test_output_that_nobody_reads() -> None:
    """As the end of a pipe that | head has closed; it was told as an error that is ignored."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", PRINTS]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert run.returncode == 0
    assert "BrokenPipe" not in run.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--drafter", str(bundled("stories-14m-redrafter")), "--data", "{data}"],
        ["evaluate", "--teacher", str(bundled("stories-4m")), "--data", "{data}"],
        ["benchmark", "--samplers", "2", "512"],
        ["benchmark", "--loss-memory", "16", "512"],
        ["benchmark", "--num-prompts", "1", "--max-tokens", "4", "--no-calibrate"],
    ],
)
def test_what_was_measured_is_kept_where_nobody_reads_it(
    tmp_path: Path, command: list[str]
) -> None:
    """It was shown first; behind ``| head`` it ended with status 1, and the file was not there."""
    data, output = tmp_path / "texts.jsonl", tmp_path / "result.json"
    data.write_text('{"text": "Once upon a time there was a little dog who liked to run."}\n')
    read, write = os.pipe()
    os.close(read)
    words = [word.format(data=data) for word in command]
    run = subprocess.run(
        [sys.executable, "-m", "mlx_distill.cli", *words, "--output", str(output)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    os.close(write)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert json.loads(output.read_text())


def test_example_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundled_pair: tuple[Any, Any],
) -> None:
    stream = mlx_distill.stream_generate

    def short(*arguments: Any, max_tokens: int, **options: Any) -> Any:
        return stream(*arguments, max_tokens=max_tokens // 8, **options)

    monkeypatch.setattr(mlx_distill, "load", lambda folder: bundled_pair)
    monkeypatch.setattr(mlx_distill, "stream_generate", short)
    runpy.run_path(str(REPOSITORY / "examples" / "continue_story.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert len(out) > 200
    assert out.count("tokens per call of the model]\n") == 3


@pytest.mark.parametrize("flag", ["--model", "--drafter", "--draft-model", "--adapter-path"])
@pytest.mark.parametrize("name", ["", " ", "a\0b", "a\ud800"])
def test_names_that_no_file_can_have(
    capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    """An empty name must not be taken for the default."""
    with pytest.raises(SystemExit) as end:
        generate.main([flag, name])
    assert end.value.code == 2
    assert f"argument {flag}: must" in capsys.readouterr().err


def test_a_result_names_no_folders(tmp_path: Path) -> None:
    """Neither those of several drafters, nor one that stands beside n-grams."""
    folder = tmp_path / "mine"
    folder.mkdir()
    given = {"drafters": ["ngram", str(folder), f"ngram+{folder}"], "draft_models": [str(folder)]}
    found = cli.settings(Namespace(**given, drafter=f"auto+{folder}", model="org/name+more"))
    assert found["drafters"] == ["ngram", "mine", "ngram+mine"]
    assert found["draft_models"] == ["mine"]
    assert (found["drafter"], found["model"]) == ("auto+mine", "org/name+more")
