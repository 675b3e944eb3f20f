"""What a user can get wrong, and what the commands then say.

Each mistake ends with exit status 2 and one line on stderr that begins with "error: ", names what
is wrong and tells its value or its place. There is no traceback, and nothing is left behind.
"""

import importlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import (
    TARGET,
    Run,
    changed,
    save_tiny,
    set_fields,
    write,
)
from half_models import REFERENCE
from tiny_models import tiny_model

from mlx_distill import CacheConfig, InputError, benchmark, load, stream_generate, train_drafter
from mlx_distill.benchmarking import arms

# The package has a function of that name, too.
generate = importlib.import_module("mlx_distill.generate")
DRAFTER = REFERENCE
pytestmark = pytest.mark.usefixtures("bundled_once")

# ----------------------------------------------------------------------------- prompts and values


def test_empty_prompt(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the prompt is empty" in refused(generate.main, "--prompt", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "the prompt is empty" in refused(generate.main, "--prompt", "-")


@pytest.mark.parametrize("flags", [[], ["--no-drafter"]])
def test_prompt_beyond_the_context(refused: Run, flags: list[str]) -> None:
    sentence = refused(generate.main, "--prompt", "a dog " * 400, *flags)
    assert re.search(r"the prompt has \d+ tokens, the model's context is 512", sentence)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-tokens 0", "max_tokens must be .*, got 0"),
        ("--max-tokens -3", "max_tokens must be .*, got -3"),
        ("--temp -1", "temperature must be .*, got -1"),
        ("--temp nan", "temperature must be .*, got nan"),
        ("--temp inf", "temperature must be .*, got inf"),
        ("--top-p 0", "top_p must be .*, got 0"),
        ("--top-p 1.5", "top_p must be .*, got 1.5"),
        ("--top-p -0.1", "top_p must be .*, got -0.1"),
        ("--top-p nan", "top_p must be .*, got nan"),
        ("--top-k -1", "top_k must be .*, got -1"),
        ("--top-k 4097", "top_k must be .*4096 tokens, got 4097"),
        ("--min-p -0.1", "min_p must be .*, got -0.1"),
        ("--min-p 1.01", "min_p must be .*, got 1.01"),
        ("--beam-width 0", "beam_width must be .*, got 0"),
        ("--draft-length 0", "draft_length must be .*, got 0"),
        ("--nodes 0", "nodes must be .*, got 0"),
        ("--tree oak", "tree must be best-first, beam or static, got oak"),
        ("--max-kv-size 0", "max_kv_size must be .*, got 0"),
        ("--kv-bits 7", "kv_bits must be .*, got 7"),
        ("--kv-bits 4 --kv-group-size 48", "kv_group_size must be .*, got 48"),
        ("--kv-bits 4 --kv-group-size 128 --quantized-kv-start 0", "group.*128"),
        ("--kv-bits 4 --max-kv-size 64", "kv_bits and max_kv_size exclude each other"),
        ("--prefill-step-size 0", "prefill_step_size must be .*, got 0"),
        ("--seed -1", "seed must be .*-1"),
        ("--seed 99999999999999999999", "seed must be"),
        ('--ignore-chat-template --chat-template-config {"a":1}', "--ignore-chat-template leaves"),
        ("--ignore-chat-template --system-prompt x", "--ignore-chat-template leaves"),
        ("--no-drafter --drafter x", "exclude each other"),
        ("--no-drafter --draft-model x", "--draft-model and --no-drafter exclude each other"),
        ("--no-drafter --nodes 4", "--no-drafter drafts nothing; leave --nodes out"),
        ("--learn-rate 1e-4", "nothing is learned without --learn, the folder; leave --learn-rate"),
        ("--no-drafter --compare", "--compare needs a drafter"),
        ("--chat-template-config {", "--chat-template-config is not JSON"),
        ("--chat-template-config [1]", "--chat-template-config must be a JSON object"),
        ("--system-prompt Hello", "--system-prompt needs a tokenizer with a chat template"),
    ],
)
def test_values_out_of_range(refused: Run, flags: str, message: str) -> None:
    sentence = refused(generate.main, *flags.split())
    assert re.search(message, sentence), sentence


def test_prompt_that_is_no_text(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that is not UTF-8 reaches Python as half of a surrogate pair."""
    assert "the prompt is not text" in refused(generate.main, "--prompt", "a\udcffb")
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "stdin is not utf-8 text" in refused(generate.main, "--prompt", "-")


def test_top_k_of_all_tokens_is_no_filter(capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's own sampler would refuse it."""
    flags = "--max-tokens 2 --temp 1 --top-k 4096 --compare"
    assert generate.main(flags.split()) == 0
    assert "mlx-lm alone" in capsys.readouterr().err


def test_empty_stop_text(refused: Run) -> None:
    assert "stop text must not be empty" in refused(generate.main, "--stop", "")


@pytest.mark.parametrize("flags", ["--temp warm", "--max-tokens 1.5", "--nodes", "--colour red"])
def test_argparse_refuses_what_is_no_number_or_no_flag(
    capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    with pytest.raises(SystemExit) as end:
        generate.main(flags.split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("see --help")


def test_window_that_cannot_be_quantized(tmp_path: Path) -> None:
    """The cache of a sliding window has no quantised form in mlx-lm."""
    model, tokenizer = load(save_tiny("llama-sliding", tmp_path / "model"))
    cache = CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    with pytest.raises(InputError, match="quantis"):
        stream_generate(model, tokenizer, [1, 2, 3], cache=cache)


@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
def test_attention_that_reads_no_quantised_cache(name: str, start: int, tokenizer: Any) -> None:
    """It is said before the first token, and not where the cache is quantised."""
    model = tiny_model(name, head_dim=32, v_head_dim=32, qk_nope_head_dim=32, qk_rope_head_dim=32)
    cache = CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=start)
    with pytest.raises(InputError, match="cannot read a quantised cache"):
        stream_generate(model, tokenizer, [1, 2, 3], cache=cache)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% for %}", "template"), ("{{ raise_exception('no system role') }}", "no system role")],
)
def test_chat_template_that_fails(
    refused: Run, tmp_path: Path, template: str, message: str
) -> None:
    edit = set_fields(chat_template=template)
    folder = changed(TARGET, tmp_path / "model", tokenizer_config__json=edit)
    sentence = refused(generate.main, "--model", folder, "--no-drafter", "--system-prompt", "x")
    assert message in sentence


@pytest.mark.parametrize("config", ['{"tokenize": false}', '{"conversation": []}'])
def test_chat_template_config_that_cannot_be(refused: Run, tmp_path: Path, config: str) -> None:
    edit = set_fields(chat_template="{{ messages[0]['content'] }}")
    folder = changed(TARGET, tmp_path / "model", tokenizer_config__json=edit)
    flags = ["--no-drafter", "--chat-template-config", config]
    assert "chat template" in refused(generate.main, "--model", folder, *flags)


# ------------------------------------------------------------------------------------------ JSONL


BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": \n', r"prompts.jsonl, line 2: not JSON: .* column"),
    "after blank lines": ('\n\n{"prompt": "a"}\n\nnonsense\n', r"prompts.jsonl, line 5: not JSON"),
    "not an object": ('["a"]\n', r"prompts.jsonl, line 1: expected a JSON object, got list"),
    "no key": ('{"prompt": "a"}\n{"question": "b"}\n', r"prompts.jsonl, \w+ 2: .*\['question'\]"),
    "no key after blank lines": ('{"prompt": "a"}\n\n\n{"x": 1}\n', r"prompts.jsonl, \w+ 4: "),
    "empty text": ('{"text": ""}\n', r"prompts.jsonl, \w+ 1: expected a non-empty text, got ''"),
    "number as prompt": ('{"prompt": 3}\n', r"prompts.jsonl, \w+ 1: .* got 3"),
    "no turns": ('{"turns": []}\n', r"prompts.jsonl, \w+ 1: "),
    "turn is no text": ('{"turns": [1]}\n', r"prompts.jsonl, \w+ 1: .* got 1"),
    "messages are no list": ('{"messages": "hi"}\n', r"prompts.jsonl, \w+ 1: messages must be"),
    "messages are no objects": ('{"messages": ["hi"]}\n', r"prompts.jsonl, \w+ 1: messages must"),
    "no question": ('{"messages": [{"role": "assistant"}]}\n', r"prompts.jsonl, \w+ 1: the chat"),
    "chat without template": ('{"messages": [{"role": "user", "content": "hi"}]}\n', "template"),
    "no rows": ("\n\n", "prompts.jsonl holds no prompts"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}\n', "prompts.jsonl is not UTF-8 text: .* at byte"),
    "lone surrogate": (b'{"prompt": "\\ud800"}\n', "the prompt is not text"),
    "zero bytes": (b"\x00\x00", r"prompts.jsonl, line 1: not JSON"),
}


@pytest.mark.parametrize("main", [train_drafter.main, benchmark.main])
@pytest.mark.parametrize("case", BAD_LINES)
def test_malformed_jsonl(refused: Run, tmp_path: Path, main: Callable[..., int], case: str) -> None:
    content, message = BAD_LINES[case]
    data = tmp_path / "prompts.jsonl"
    write(content)(data)
    output = tmp_path / "output"
    sentence = refused(main, "--data", data, "--output", output)
    assert re.search(message, sentence), sentence
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("main", [train_drafter.main, benchmark.main])
def test_unreadable_jsonl(refused: Run, tmp_path: Path, main: Callable[..., int]) -> None:
    for data in (tmp_path / "missing.jsonl", tmp_path):
        sentence = refused(main, "--data", data, "--output", tmp_path / "output")
        assert str(data) in sentence
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- benchmark


def too_late(*arguments: Any) -> None:
    raise AssertionError("the measurement has begun")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-prompts 0", "num_prompts must be .*, got 0"),
        ("--num-prompts 49", "49 prompts were asked for, there are 48"),
        ("--prompt-tokens 0", "prompt_tokens must be .*, got 0"),
        ("--max-tokens 0", "max_tokens must be .*, got 0"),
        ("--num-draft-tokens 0", "num_draft_tokens must be .*, got 0"),
        ("--sweep-prompts -1", "sweep_prompts must be .*, got -1"),
        ("--sweep-prompts 4 --num-prompts 3", "sweep_prompts must be .*, got 4"),
        ("--sweep-prompts 1 --plot sweep.foo", "end its name with .png, got sweep.foo"),
        ("--sweep-prompts 1 --sweep-widths 0", "must be at least 1.*, got 0"),
        ("--sweep-prompts 1 --sweep-lengths 2 0", "must be at least 1.*, got 0"),
        ("--temp -1", "temperature must be .*, got -1"),
        ("--top-k 5000", "top_k must be .*4096 tokens, got 5000"),
        ("--nodes 0", "nodes must be .*, got 0"),
        ("--long-run -5", "long.run must be .*, got -5"),
        ("--plot sweep.png", "--plot draws the sweep"),
        ("--drafter nowhere", "there is no folder nowhere"),
        ("--draft-model nowhere", "there is no folder nowhere"),
        ("--seed -1", "seed must be .*-1"),
    ],
)
def test_benchmark_values_out_of_range(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    """Before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arms, "measure", too_late)
    sentence = refused(benchmark.main, "--output", "out.json", *flags.split())
    assert re.search(message, sentence), sentence
    assert list(tmp_path.iterdir()) == []


def test_benchmark_output_that_cannot_be_written(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out before the measurement, not after it."""
    monkeypatch.setattr(arms, "measure", too_late)
    there = tmp_path / "there"
    there.write_text("mine")
    sweep = ["--sweep-prompts", "1"]
    for flag, path in [
        ("--output", there),
        ("--plot", there),
        ("--output", tmp_path / "no" / "result.json"),
        ("--plot", tmp_path / "no" / "plot.png"),
    ]:
        assert str(path) in refused(benchmark.main, *sweep, flag, path)
    assert there.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [there]
