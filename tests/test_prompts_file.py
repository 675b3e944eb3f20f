"""Files of prompts: every row answered as it would be alone, and no answer lost to a kill."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_distill
from mlx_distill import benchmark
from mlx_distill.checkpoint import bundled
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.speculation import prompts_file
from mlx_distill.speculation.batch_generation import stream_answers

generate = importlib.import_module("mlx_distill.generate")

pytestmark = pytest.mark.usefixtures("bundled_once")

ROWS = [
    {"prompt": "Once upon a time", "max_tokens": 6},
    {"prompt": ""},
    {"prompt": "The cat", "temperature": 1.0, "seed": 3},
    {"prompt": "The dog", "max_tokens": "many"},
    {"question": "?"},
    {"prompt": "Ben had a red kite.", "stop": ["."]},
    {"prompt": "Tom", "stop": 5},
    {"prompt": "Tom saw a big", "temperature": "hot"},
    {"prompt": "Lily went to the park " * 200},
]
FLAGS = ["-m", "10", "--temp", "0.8", "--seed", "7", "--no-calibrate", "--batch", "2"]

DAMAGED = [
    "\0\0\0\n",
    "\n",
    "[0]\n",
    '{"index": 2, "tex\n',
    '{"text": "of no row"}\n',
    '{"index": 99, "error": "of no row"}\n',
    '{"index": -1, "error": "of no row"}\n',
    '{"index": "2", "error": "of no row"}\n',
    '{"index": true, "error": "of no row"}\n',
    '{"index": 2, "error": 5}\n',
    '{"index": 2, "text": "lacks the rest"}\n',
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(file: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    flags = ["--prompts-file", str(file), "--output", str(output), *FLAGS, *more]
    assert generate.main(flags) == 0
    assert [found.name for found in output.parent.glob(f"{output.name}*")] == [output.name]
    return answers(output)


def test_every_row_is_answered_as_alone(
    file: Path, tmp_path: Path, bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = written(file, tmp_path / "answers.jsonl")
    assert [one["index"] for one in found] == list(range(len(ROWS)))
    reasons = {1: "line 2", 3: "max_tokens", 4: "line 5", 6: "stop", 7: "temperature", 8: "context"}
    assert {place for place, one in enumerate(found) if "error" in one} == reasons.keys()
    for place, reason in reasons.items():
        assert reason in found[place]["error"]
    assert "6 of them failed" in capsys.readouterr().err
    for place in (0, 2, 5):
        own = {"temperature": 0.8, "seed": 7 + place, "max_tokens": 10, **ROWS[place]}
        ids = encode_prompt(bundled_pair[1], own.pop("prompt"))
        assert found[place]["text"] == mlx_distill.generate(*bundled_pair, ids, **own)


def test_a_document_is_gone_on_with_to_its_end(
    tmp_path: Path, bundled_pair: tuple[Any, Any]
) -> None:
    """A benchmark takes its first 32 tokens; here they were all that was read of it."""
    text = "Ben had a red kite that was bigger than he was. " * 4 + "Then one day"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"text": text, "max_tokens": 6, "temperature": 0.0}) + "\n")
    (found,) = written(file, tmp_path / "answers.jsonl")
    assert found["prompt_tokens"] == len(bundled_pair[1].encode(text)) > 32
    assert found["text"] == mlx_distill.generate(*bundled_pair, text, max_tokens=6)


def test_the_largest_seed_is_one(tmp_path: Path) -> None:
    """Every row but the first was refused."""
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nOnce\n")
    found = written(file, tmp_path / "answers.jsonl", "--seed", str(2**63 - 1))
    assert all("error" not in one for one in found)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "--chat-template-config needs a tokenizer with a chat template; this has none"),
        (["--ignore-chat-template"], "which --ignore-chat-template leaves out"),
    ],
)
def test_arguments_of_no_template(
    file: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    """As of one prompt, they are refused; they were passed over."""
    flags = ["--prompts-file", str(file), "--chat-template-config", '{"enable_thinking": false}']
    assert generate.main([*flags, *more]) == 2
    assert sentence in capsys.readouterr().err
    prompts = ["--data", str(file), "--num-prompts", "1", *flags[2:], *more]
    assert benchmark.main(prompts) == 2
    assert sentence in capsys.readouterr().err


def stopped(*args: Any, **options: Any) -> Iterator[Any]:
    """Yield the first answers, and be stopped."""
    yield next(stream_answers(*args, **options))
    raise KeyboardInterrupt


def test_what_was_stopped_goes_on(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = written(file, tmp_path / "whole.jsonl")
    output = tmp_path / "answers.jsonl"
    asked = ["--prompts-file", str(file), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(prompts_file, "stream_answers", stopped)
        assert generate.main([*asked, *FLAGS]) == 130
    assert "6 of 9 answers are kept" in capsys.readouterr().err
    writing = tmp_path / "answers.jsonl.writing"
    lines = writing.read_text().splitlines(keepends=True)
    assert not output.exists()
    # A line that the kill has cut, one that says what nobody would write again, and damaged ones.
    changed = json.loads(lines[-1]) | {"finish_reason": "kept"}
    writing.write_text("".join([*lines[:-1], json.dumps(changed) + "\n", *DAMAGED, lines[-1][:9]]))
    assert generate.main([*asked, *FLAGS, "--seed", "8"]) == 2  # answers of another run
    assert not output.exists()
    capsys.readouterr()
    found = written(file, output, "--batch", "3")
    assert "s; 6 of them were there before; 6 of them failed" in capsys.readouterr().err
    assert found.pop(changed["index"]) == changed
    whole.pop(changed["index"])
    assert found == whole


def test_answers_outlive_a_kill_while_they_are_put_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was written over in place: a kill in between left nothing of it."""
    writing, header = tmp_path / "answers.jsonl.writing", '{"prompts": "these"}'
    kept = [json.dumps({"index": index, "error": "none"}) + "\n" for index in range(50)]
    writing.write_text("".join([header + "\n", *DAMAGED, *kept, kept[0][:5]]))

    def resume() -> dict[int, Any]:
        return prompts_file._resume(writing, tmp_path / "answers.jsonl.whole", header, 50)

    def killed(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            resume()
    assert sorted(resume()) == list(range(50))


def test_what_somebody_else_has_written_meanwhile_stays(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was written over when the last answer was there."""
    output = tmp_path / "answers.jsonl"

    def beside(*args: Any, **options: Any) -> Iterator[Any]:
        output.write_text("another's")
        yield from stream_answers(*args, **options)

    asked = ["--prompts-file", str(file), "--output", str(output), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(prompts_file, "stream_answers", beside)
        assert generate.main(asked) == 2
    assert f"the output {output} exists" in capsys.readouterr().err
    assert output.read_text() == "another's"
    output.unlink()
    assert len(written(file, output)) == len(ROWS)
    assert "9 of them were there before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--model", "a/m"], ["--model", "b/m"]),
        (["--kv-bits", "8"], ["--kv-bits", "8", "--quantized-kv-start", "0"]),
        (["--kv-bits", "8"], ["--kv-bits", "8", "--kv-group-size", "32"]),
        (["--exact-rows"], []),
        (["--draft-model", "b/m"], []),
        (["--draft-model", "b/m"], ["--draft-model", "b/m", "--num-draft-tokens", "2"]),
    ],
)
def test_answers_of_other_weights_or_settings_are_not_mixed(
    first: list[str],
    then: list[str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two models may lie in folders of one name."""
    for folder, name in (("a", "stories-14m"), ("b", "stories-4m")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m").symlink_to(bundled(name), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "answers.jsonl"
    asked = ["--prompts-file", str(file), "--output", str(output), "-m", "2"]
    asked += [] if "--model" in first else ["--model", "a/m"]
    without = ["--no-drafter"]
    first, then = (one if "--draft-model" in one else [*one, *without] for one in (first, then))
    with monkeypatch.context() as patch:
        patch.setattr(prompts_file, "stream_answers", stopped)
        assert generate.main([*asked, *first]) == 130
    assert generate.main([*asked, *then]) == 2
    assert "was begun with other prompts or settings" in capsys.readouterr().err
    assert generate.main([*asked, *first]) == 0


def test_a_text_file_has_a_prompt_in_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asked.txt"
    file.write_text("Once upon a time\n\nThe cat sat\n")
    assert generate.main(["--prompts-file", str(file), "-m", "4", "--no-drafter"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(one["index"] for one in found) == [0, 1]
    assert {one["generation_tokens"] for one in found} == {4}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--output", "x.jsonl"], "--output needs --prompts-file"),
        (["--batch", "2"], "--batch needs --prompts-file"),
        (["--prompts-file", "FILE", "--batch", "0"], "batch"),
        (["--prompts-file", "FILE", "--json"], "--json goes with one prompt"),
        (
            ["--prompts-file", "FILE", "--prefill-response", "Yes"],
            "--prefill-response goes with one prompt",
        ),
        (["--prompts-file", "FILE", "-p", "x"], "has the prompts; leave --prompt out"),
        (["--prompts-file", "FILE", "--compare"], "--compare goes with one prompt"),
        (["--prompts-file", "none.jsonl"], "none.jsonl"),
        (["--prompts-file", "FILE", "--output", "FILE"], "exists"),
    ],
)
def test_what_does_not_fit_is_refused(
    file: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([flag.replace("FILE", str(file)) for flag in flags]) == 2
    assert reason in capsys.readouterr().err
