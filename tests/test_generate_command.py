"""The command ``generate``: what it takes for the prompt, and what it shows of it."""

import importlib
import io
import json
import sys

import pytest

generate = importlib.import_module("mlx_distill.generate")


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert generate.main([*flags, "--no-drafter", "-m", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_line_end_in_a_prompt_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """As mlx_lm.generate reads it; a shell hands over two characters."""
    written = run(capsys, "--prompt", r"Ben ran.\nMom")["prompt_tokens"]
    assert written == run(capsys, "--prompt", "Ben ran.\nMom")["prompt_tokens"]


def test_stdin_is_read_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(r"Ben ran.\nMom"))
    assert run(capsys, "--prompt", "-")["prompt_tokens"] == 7
    assert run(capsys, "--prompt", r"Ben ran.\nMom")["prompt_tokens"] == 6


def test_a_terminal_shows_the_prompt_dimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-m", "6", "--verbose", "false"]
    plain, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", plain)
    assert generate.main(flags) == 0
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert generate.main(flags) == 0
    assert plain.getvalue().startswith(",")
    assert terminal.getvalue() == f"\x1b[2mOnce upon a time\x1b[0m{plain.getvalue()}"


@pytest.mark.parametrize(
    "asked", [["--drafter", "ngram"], ["--draft", "ngram"], ["--draft", "ngram+drafter"]]
)
def test_n_grams_draft_by_name(capsys: pytest.CaptureFixture[str], asked: list[str]) -> None:
    flags = ["--prompt", "Tom had a red ball. Tom had a", "-m", "12", "--json", "--no-calibrate"]
    assert generate.main([*flags, *asked]) == 0
    drafted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert generate.main([*flags, "--no-drafter"]) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert drafted["text"] == plain["text"]
    assert drafted["drafted_tokens"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", ""], "argument --model: must name something, got nothing"),
        (["--drafter", ""], "argument --drafter: must name something, got nothing"),
        (["--draft-model", " "], "argument --draft-model: must name something, got nothing"),
        (["--prompt", ""], "the prompt is empty"),
        (["--temp", "1e300"], "temperature must be 0, or between 1e-6 and 100, got 1e+300"),
        (["--nodes", "1000000000000"], "nodes must be between 1 and 1,024, got 1000000000000"),
        (
            ["--beam-width", "1000000000000"],
            "beam_width must be between 1 and 256, got 1",
        ),
        (["--draft-length", "65"], "draft_length must be between 1 and 64, got 65"),
        (["--num-draft-tokens", "1000000000000"], "num_draft_tokens must be between 1 and 64"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--draft", "bigram"], "argument --draft: invalid choice: 'bigram'"),
        (["--draft", "ngram", "--drafter", "x"], "--draft ngram takes no --drafter"),
        (["--draft", "ngram", "--no-drafter"], "--draft ngram and --no-drafter exclude"),
        (["--draft-verification", "block"], "is for the chains of a --draft-model; name one"),
        (
            ["--draft-verification", "block", "--draft", "ngram+drafter", "--draft-model", "x"],
            "--draft ngram+drafter makes trees, blocks are chains",
        ),
    ],
)
def test_what_is_out_of_range_is_said(
    capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    try:
        status = generate.main(flags)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
