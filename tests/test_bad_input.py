"""What a user can get wrong, and what the commands then say.

Each mistake ends with exit status 2 and one line on stderr that begins with "error: ", names what
is wrong and tells its value or its place. There is no traceback, and nothing is left behind.
"""

import errno
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from conftest import ModelIn
from damage import (
    TARGET,
    Edit,
    Run,
    changed,
    cut,
    delete,
    edit_arrays,
    edit_header,
    save_tiny,
    set_fields,
    write,
)
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, InputError, benchmark, load, stream_generate, train_drafter
from mlx_distill.benchmarking import arms
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.drafters.recurrent_folder import save_drafter
from mlx_distill.target.target import Target

# The package has a function of that name, too.
generate = importlib.import_module("mlx_distill.generate")
DRAFTER = bundled("stories-14m-redrafter")
pytestmark = pytest.mark.usefixtures("bundled_once")


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "~/no-such"])
@pytest.mark.parametrize("flag", ["--model", "--drafter"])
def test_missing_folder(refused: Run, flag: str, name: str) -> None:
    sentence = refused(generate.main, flag, name)
    assert name in sentence
    assert "there is no folder" in sentence


INDEX = "model__safetensors__index__json"
INCOMPLETE: dict[str, tuple[dict[str, Edit], str]] = {
    "no config": ({"config__json": delete}, "holds no config.json"),
    "no weights": ({"model__safetensors": delete}, "holds no weights"),
    "no tokenizer": ({"tokenizer__model": delete, "tokenizer__json": delete}, "tokenizer"),
    "missing shard": (
        {
            INDEX: write(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors", '
                '"b": "model.safetensors"}}'
            )
        },
        "model-00001-of-00002.safetensors is missing",
    ),
    "broken index": ({INDEX: write("{")}, "model.safetensors.index.json cannot be read as JSON"),
    "index without a map": ({INDEX: write("{}")}, "holds no weights"),
    "index of another kind": ({INDEX: write('{"weight_map": null}')}, "index.json|no weights"),
    "index is a list": ({INDEX: write("[]")}, "index.json does not hold a JSON object"),
    "no model_type": ({"config__json": set_fields(model_type=None)}, "lacks the field model_type"),
    "unknown model_type": (
        {"config__json": set_fields(model_type="abacus")},
        "abacus not supported",
    ),
    "model_type is no text": ({"config__json": set_fields(model_type=7)}, "model_type|7"),
    "broken JSON": ({"config__json": write('{"model_type": ')}, "cannot be read as JSON"),
    "config is a list": ({"config__json": write("[1, 2]")}, "does not hold a JSON object"),
    "config is not text": ({"config__json": write(b"\xff\xfe\x00")}, "cannot be read as JSON"),
    "empty config": ({"config__json": write("")}, "cannot be read as JSON"),
    "missing field": ({"config__json": set_fields(hidden_size=None)}, "hidden_size"),
    "field of another type": (
        {"config__json": set_fields(num_hidden_layers="many")},
        "cannot be loaded",
    ),
    "no heads": ({"config__json": set_fields(num_attention_heads=0)}, "cannot be loaded"),
    "other sizes": ({"config__json": set_fields(hidden_size=128)}, "cannot be loaded"),
    "truncated weights": (
        {"model__safetensors": cut(0.7)},
        r"model.safetensors is damaged: it has \d+ bytes, its header speaks of \d+",
    ),
    "weights cut in the header": (
        {"model__safetensors": cut(1e-4)},
        "model.safetensors is damaged",
    ),
    "empty weights": ({"model__safetensors": write("")}, "model.safetensors is damaged"),
    "weights are text": (
        {"model__safetensors": write("version https://git-lfs.github.com/spec/v1\n" * 3)},
        "model.safetensors is damaged",
    ),
    "unknown kind of array": (
        {"model__safetensors": edit_header(lambda h: h.replace(b'"BF16"', b'"XY16"', 1))},
        "cannot be loaded|is damaged",
    ),
    "array of another shape": (
        {"model__safetensors": edit_header(lambda h: h.replace(b"[384]", b"[383]", 1))},
        "cannot be loaded|is damaged",
    ),
    "missing array": (
        {"model__safetensors": edit_arrays(lambda a: a.pop("model.norm.weight"))},
        "cannot be loaded: .*model.norm.weight|cannot be loaded: Missing",
    ),
    "array too many": (
        {"model__safetensors": edit_arrays(lambda a: a.update(spare=mx.zeros(3)))},
        "cannot be loaded: .*spare|cannot be loaded: Received",
    ),
    "damaged tokenizer": (
        {"tokenizer__model": write("tokens" * 50), "tokenizer__json": delete},
        "cannot be loaded",
    ),
    "damaged tokenizer.json": ({"tokenizer__json": write("tokens" * 50)}, "cannot be loaded"),
    "broken tokenizer_config": ({"tokenizer_config__json": write("{")}, "cannot be loaded|JSON"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_or_damaged_model(refused: Run, tmp_path: Path, case: str) -> None:
    edits, message = INCOMPLETE[case]
    folder = changed(TARGET, tmp_path / "model", **edits)
    sentence = refused(generate.main, "--model", folder, "--no-drafter")
    assert re.search(message, sentence), sentence
    assert "model" in sentence


@pytest.mark.parametrize("main", [generate.main, benchmark.main, train_drafter.main])
def test_every_command_refuses_a_damaged_model(
    refused: Run, tmp_path: Path, main: Callable[..., int]
) -> None:
    folder = changed(TARGET, tmp_path / "model", model__safetensors=cut(0.5))
    arguments: list[Any] = ["--model", folder]
    if main is train_drafter.main:
        arguments += ["--data", benchmark.PROMPTS, "--output", tmp_path / "out"]
    else:
        arguments += ["--drafter", DRAFTER]
    assert "model.safetensors is damaged" in refused(main, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_file_as_model(refused: Run) -> None:
    for flag in ("--model", "--drafter"):
        sentence = refused(generate.main, flag, TARGET / "config.json")
        assert "config.json is a file" in sentence


def test_drafter_as_model_and_model_as_drafter(refused: Run) -> None:
    assert "holds a drafter" in refused(generate.main, "--model", DRAFTER)
    sentence = refused(generate.main, "--drafter", TARGET)
    assert "holds a llama, not a recurrent_drafter" in sentence


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nTry again."),
        OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
        OSError("We couldn't connect to 'https://huggingface.co'"),
        ConnectionError("[Errno -2] Name or service not known"),
    ],
)
@pytest.mark.parametrize("flag", ["--model", "--drafter"])
def test_hub_name_without_network(
    refused: Run, monkeypatch: pytest.MonkeyPatch, flag: str, error: Exception
) -> None:
    def unreachable(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    sentence = refused(generate.main, flag, "somebody/some-model")
    assert "there is no folder somebody/some-model" in sentence
    assert "could not be fetched from the hub" in sentence
    assert str(error).splitlines()[0] in sentence


def test_no_number_in_the_logits(refused: Run, tmp_path: Path) -> None:
    """With and without a drafter, the weights are what is named."""
    spoil = edit_arrays(lambda a: a.update({"model.norm.weight": mx.full((384,), mx.nan)}))
    folder = changed(TARGET, tmp_path / "model", model__safetensors=spoil)
    for flags in (["--no-drafter"], ["--drafter", DRAFTER]):
        sentence = refused(generate.main, "--model", folder, *flags, alone=False)
        assert re.search("not numbers after (0 tokens|a few tokens)", sentence)
        assert "weights" in sentence


def test_no_number_in_the_logits_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 15 is damaged: five tokens of the prompt and ten of the answer come before."""
    model, tokenizer = tiny_model("gpt2"), mlx_distill.load(TARGET)[1]
    monkeypatch.setattr(tokenizer, "eos_token_ids", set())
    target = Target.of(model)
    assert target.embed is not None
    network = RecurrentDrafter(RecurrentDrafterConfig(64, 97, 32, 1))
    drafter = BoundDrafter(network, target.embed, {})
    model.model.wpe.weight[15] = mx.nan

    def tokens(drafter: Any) -> tuple[list[int], str]:
        found = []
        responses = mlx_distill.stream_generate(
            model, tokenizer, [5, 17, 42, 8, 23], drafter=drafter
        )
        try:
            found += (response.token for response in responses)
        except InputError as error:
            return found, str(error)
        raise AssertionError("nobody noticed")

    plain, sentence = tokens(None)
    assert len(plain) == 11
    assert "not numbers after 11 tokens of its answer" in sentence
    # A draft that reaches into the damage may spoil what is verified with it, not more: four
    # drafted tokens follow the certain one.
    drafted, sentence = tokens(drafter)
    assert drafted == plain[: len(drafted)]
    assert len(drafted) >= 6
    assert f"not numbers after {len(drafted)} tokens of its answer" in sentence


# ---------------------------------------------------------------------------------- the drafter


BAD_DRAFTERS: dict[str, tuple[dict[str, Edit], str]] = {
    "no config": ({"config__json": delete}, "holds no config.json"),
    "no weights": ({"model__safetensors": delete}, "model.safetensors is missing"),
    "broken JSON": ({"config__json": write("{]")}, "config.json cannot be read as JSON"),
    "no model_type": ({"config__json": set_fields(model_type=None)}, "not a recurrent_drafter"),
    "another kind": ({"config__json": set_fields(model_type="medusa")}, "holds a medusa, not a"),
    "newer format": ({"config__json": set_fields(format_version=2)}, "has format version 2"),
    "no target": ({"config__json": set_fields(target=None)}, "lacks the field target"),
    "unknown field": ({"config__json": set_fields(colour="red")}, "unknown fields: colour"),
    "missing field": ({"config__json": set_fields(exit_dim=None)}, "lacks the fields: exit_dim"),
    "negative layers": (
        {"config__json": set_fields(num_draft_layers=-1)},
        "num_draft_layers must be .* -1",
    ),
    "too many tokens": (
        {"config__json": set_fields(draft_vocab_size=5000)},
        "draft_vocab_size must be .*4096, got 5000",
    ),
    "other width": ({"config__json": set_fields(exit_dim=64)}, "does not fit its config"),
    "other state": ({"config__json": set_fields(hidden_size=64)}, "does not fit|hidden size"),
    "more layers": ({"config__json": set_fields(num_draft_layers=2)}, "does not fit its config"),
    "no recurrence": ({"config__json": set_fields(rnn=False)}, "does not fit its config"),
    "truncated": ({"model__safetensors": cut(0.9)}, "model.safetensors is damaged"),
    "cut in the header": ({"model__safetensors": cut(1e-4)}, "model.safetensors is damaged"),
    "not safetensors": ({"model__safetensors": write("weights")}, "model.safetensors is damaged"),
    "unknown kind of array": (
        {"model__safetensors": edit_header(lambda h: h.replace(b'"F16"', b'"X16"', 1))},
        "model.safetensors",
    ),
    "array of another shape": (
        {"model__safetensors": edit_header(lambda h: h.replace(b"[256]", b"[255]", 1))},
        "model.safetensors",
    ),
    "missing array": (
        {"model__safetensors": edit_arrays(lambda a: a.pop("rnn_w.weight"))},
        "does not fit its config: .*(rnn_w|Missing)",
    ),
    "hidden size": (
        {"config__json": set_fields(target={"hidden_size": 64, "vocab_size": 4096})},
        "made for another target: its hidden size is 64, this model's is 384",
    ),
    "vocabulary": (
        {"config__json": set_fields(target={"hidden_size": 384, "vocab_size": 32000})},
        "made for another target: its vocab size is 32000, this model's is 4096",
    ),
    "tokenizer": (
        {
            "config__json": set_fields(
                target={"hidden_size": 384, "vocab_size": 4096, "tokenizer_hash": "0123"}
            )
        },
        "made for another target: its tokenizer hash is 0123, this model's is",
    ),
}


@pytest.mark.parametrize("case", BAD_DRAFTERS)
def test_drafter_that_does_not_fit_or_is_damaged(refused: Run, tmp_path: Path, case: str) -> None:
    edits, message = BAD_DRAFTERS[case]
    folder = changed(DRAFTER, tmp_path / "drafter", **edits)
    sentence = refused(generate.main, "--drafter", folder)
    assert re.search(message, sentence), sentence


def test_drafters_that_could_end_the_process_or_that_types_refuse(tmp_path: Path) -> None:
    """In a process of its own: an index out of bounds can end it, and nothing checks types."""
    edits: list[tuple[Edit, str]] = [
        *(
            (set_fields(exit_dim=value), f"exit_dim must be .*, got {value!r}")
            for value in ("x", 2.5)
        ),
        *(
            (moved_ids(by), "token_ids must lie in the vocabulary of 4096")
            for by in (3000, 10**7, -2000)
        ),
    ]
    folders = []
    for number, (edit, _) in enumerate(edits):
        file = "config__json" if number < 2 else "model__safetensors"
        folders.append(changed(DRAFTER, tmp_path / str(number), **{file: edit}))
    program = "import sys; from mlx_distill.generate import main\nfor folder in sys.argv[1:]:\n"
    program += "    assert main(['--drafter', folder]) == 2"
    command = [sys.executable, "-c", program, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    for line, (_, message) in zip(lines, edits, strict=True):
        assert line.startswith("error: ")
        assert re.search(message, line), line


def moved_ids(offset: int) -> Edit:
    return edit_arrays(lambda a: a.update(token_ids=a["token_ids"] + offset))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ids: mx.where(ids == ids[1], ids[0], ids), "must not name a token twice"),
        (lambda ids: ids.astype(mx.float32), "must be whole numbers"),
    ],
)
def test_drafter_whose_tokens_are_no_map(
    refused: Run, tmp_path: Path, edit: Callable[[mx.array], mx.array], message: str
) -> None:
    """Two children of one node with the same token would both be accepted."""
    spoil = edit_arrays(lambda a: a.update(token_ids=edit(a["token_ids"])))
    folder = changed(DRAFTER, tmp_path / "drafter", model__safetensors=spoil)
    assert message in refused(generate.main, "--drafter", folder)


def test_drafter_of_another_model(refused: Run, tmp_path: Path) -> None:
    """Really another one, not an edited fingerprint."""
    model = save_tiny("llama", tmp_path / "model")
    sentence = refused(generate.main, "--model", model, "--drafter", DRAFTER)
    assert "made for another target: its hidden size is 384, this model's is 64" in sentence
    assert "made for another" in refused(
        benchmark.main, "--model", model, "--drafter", DRAFTER, "--output", tmp_path / "out.json"
    )
    assert not (tmp_path / "out.json").exists()


def test_target_that_cannot_be_drafted_for(refused: Run, tmp_path: Path) -> None:
    model = save_tiny("phi3small", tmp_path / "model")
    sentence = refused(generate.main, "--model", model, "--drafter", DRAFTER)
    assert "phi3small cannot be drafted for: mlx-lm's version lets" in sentence
    assert "--no-drafter" in sentence
    arguments = ["--data", benchmark.PROMPTS, "--output", tmp_path / "drafter"]
    sentence = refused(train_drafter.main, "--model", model, *arguments)
    assert "phi3small cannot be drafted for" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
        ("--tree oak", "tree must be best-first or beam, got oak"),
        ("--max-kv-size 0", "max_kv_size must be .*, got 0"),
        ("--kv-bits 7", "kv_bits must be .*, got 7"),
        ("--kv-bits 4 --kv-group-size 48", "kv_group_size must be .*, got 48"),
        ("--kv-bits 4 --kv-group-size 128 --quantized-kv-start 0", "group.*128"),
        ("--kv-bits 4 --max-kv-size 64", "kv_bits and max_kv_size exclude each other"),
        ("--prefill-step-size 0", "prefill_step_size must be .*, got 0"),
        ("--seed -1", "seed must be .*-1"),
        ("--seed 99999999999999999999", "seed must be"),
        ('--ignore-chat-template --chat-template-config {"a":1}', "needs a tokenizer with a chat"),
        ("--no-drafter --drafter x", "exclude each other"),
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


# ---------------------------------------------------------------------------------- train_drafter


TINY = [
    *("--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "2", "--batch-size", "2"),
    *("--max-tokens", "6", "--held-out", "1", "--steps", "6", "--checkpoint-every", "2"),
    *("--max-prompts", "4", "--prompt-tokens", "5", "--response-batch-size", "2", "--quiet"),
]


@pytest.fixture(scope="module")
def tiny(model_in: ModelIn) -> list[str]:
    """Return the arguments of a tiny training but for its output."""
    model = model_in("tiny", "float16")
    return ["--model", str(model), "--data", str(benchmark.PROMPTS), *TINY]


@pytest.fixture
def arguments(tmp_path: Path, tiny: list[str]) -> list[str]:
    """Return the arguments of a tiny training."""
    return [*tiny, "--output", str(tmp_path / "drafter")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "steps must be .*, got 0"),
        ("--checkpoint-every 0", "checkpoint_every must be .*, got 0"),
        ("--evaluate-every 0", "evaluate_every must be .*, got 0"),
        ("--learning-rate 0", "learning_rate must be .*, got 0"),
        ("--learning-rate -1", "learning_rate must be .*, got -1"),
        ("--learning-rate nan", "learning_rate must be .*, got nan"),
        ("--warmup -0.5", "warmup must be .*, got -0.5"),
        ("--warmup 2", "warmup must be .*, got 2"),
        ("--weight-decay nan", "weight_decay must be .*, got nan"),
        ("--max-grad-norm 0", "max_grad_norm must be .*, got 0"),
        ("--batch-size 0", "batch_size must be .*, got 0"),
        ("--unroll 0", "unroll must be .*, got 0"),
        ("--held-out 0", "held_out must be .*, got 0"),
        ("--held-out 4", "4 prompts are too few: 4 are held out"),
        ("--decay 0", "decay must be .*, got 0"),
        ("--decay 1.5", "decay must be .*, got 1.5"),
        ("--exit-dim 0", "exit_dim must be .*, got 0"),
        ("--exit-dim -4", "exit_dim must be .*, got -4"),
        ("--num-draft-layers -1", "num_draft_layers must be .*, got -1"),
        ("--draft-vocab-size -1", "draft_vocab_size must be .*, got -1"),
        ("--draft-vocab-size 5000", "draft_vocab_size must be .*4,?096, got 5000"),
        ("--max-tokens 0", "max_tokens must be .*, got 0"),
        ("--max-tokens 600", r"the model's context is 512; use a smaller"),
        ("--response-batch-size 0", "response_batch_size must be .*, got 0"),
        ("--temperatures -1", "temperatures must be .*-1"),
        ("--temperatures 0 nan", "temperatures must be .*nan"),
        ("--temperatures inf", "temperatures must be .*inf"),
        ("--response-seed -1", "response_seed must be .*-1"),
        ("--response-seed 4294967296", "response_seed must be .*4294967296"),
        ("--prompt-tokens 0", "prompt.tokens must be .*, got 0"),
        ("--prompt-tokens -2", "prompt.tokens must be .*, got -2"),
        ("--max-prompts 0", "max.prompts must be .*, got 0|too few"),
        ("--max-prompts -2", "max.prompts must be .*, got -2"),
        ("--seed -1", "seed must be .*-1"),
    ],
)
def test_training_values_out_of_range(
    refused: Run, tmp_path: Path, arguments: list[str], flags: str, message: str
) -> None:
    knows_target = "draft-vocab-size 5000" in flags  # the prompts are read by then
    sentence = refused(train_drafter.main, *arguments, *flags.split(), alone=not knows_target)
    assert re.search(message, sentence), sentence
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    output = tmp_path / "drafter"
    output.mkdir()
    (output / "note").write_text("mine")
    assert f"the output {output} exists" in refused(train_drafter.main, *arguments)
    assert "exists" in refused(train_drafter.main, *arguments, "--resume")
    assert [path.name for path in output.iterdir()] == ["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]
    shutil.rmtree(output)
    output.write_text("a file")
    assert f"the output {output} exists" in refused(train_drafter.main, *arguments)


def test_resume_without_anything(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert "there is nothing to resume" in refused(train_drafter.main, *arguments, "--resume")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_the_machine_has_not(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    sentence = refused(train_drafter.main, *arguments, "--batch-size", "90000000", alone=False)
    assert re.search(r"memory: about [\d.]+ GB .*, but this machine has [\d.]+ GB", sentence)
    assert list(tmp_path.iterdir()) == []


class DiskFull:
    """Lets a function run a number of times, then pretends that the disk is full."""

    def __init__(self, function: Callable[..., Any], times: int):
        self.function = function
        self.times = times

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.times -= 1
        if self.times < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return self.function(*args, **options)


class Truncating(DiskFull):
    """Writes, but from a number of times on leaves out the end, without a word."""

    def __init__(self, function: Callable[..., Any], times: int, missing: int):
        super().__init__(function, times)
        self.missing = missing

    def __call__(self, path: str, *args: Any, **options: Any) -> None:
        self.function(path, *args, **options)
        self.times -= 1
        if self.times < 0:
            with open(path, "r+b") as file:
                file.truncate(max(0, os.path.getsize(path) - self.missing))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> bytes:
    """Return the weights of a tiny training that met no obstacle."""
    output = tmp_path_factory.mktemp("finished") / "drafter"
    assert train_drafter.main([*tiny, "--output", str(output)]) == 0
    return (output / "model.safetensors").read_bytes()


def resumed(arguments: list[str], tmp_path: Path) -> bytes:
    """Go on with a training that was stopped; return its weights."""
    assert train_drafter.main([*arguments, "--resume"]) == 0
    assert not (tmp_path / "drafter.partial").exists()
    return (tmp_path / "drafter" / "model.safetensors").read_bytes()


# Two files per checkpoint: with three good ones, the second file of the second checkpoint fails.
OBSTACLES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "no space for the arrays": (mx, "save_safetensors", lambda f: DiskFull(f, 3)),
    "no space for the first array": (mx, "save_safetensors", lambda f: DiskFull(f, 2)),
    "no space for the name": (os, "replace", lambda f: DiskFull(f, 2)),  # the first: settings
    "half a file": (mx, "save_safetensors", lambda f: Truncating(f, 2, 30_000)),
    "the last bytes": (mx, "save_safetensors", lambda f: Truncating(f, 3, 8)),
    "the last bytes of the network": (mx, "save_safetensors", lambda f: Truncating(f, 2, 8)),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_full_disk_during_a_checkpoint(
    refused: Run, tmp_path: Path, arguments: list[str], finished: bytes, case: str
) -> None:
    place, name, make = OBSTACLES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, make(getattr(place, name)))
        sentence = refused(train_drafter.main, *arguments, alone=False)
    assert re.search(r"the checkpoint of step 4 could not be written", sentence)
    assert re.search("No space left on device|is damaged", sentence)
    work = tmp_path / "drafter.partial"
    assert f"the last good checkpoint is {work / 'step-0000002'}" in sentence
    assert sorted(path.name for path in work.glob("*step*")) == ["step-0000002"]
    assert not (work / "writing").exists()
    assert not (tmp_path / "drafter").exists()
    assert resumed(arguments, tmp_path) == finished


def test_full_disk_at_the_first_checkpoint(
    refused: Run, tmp_path: Path, arguments: list[str], finished: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", DiskFull(mx.save_safetensors, 0))
        sentence = refused(train_drafter.main, *arguments, alone=False)
    assert re.search("there is no.* before it", sentence)
    assert resumed(arguments, tmp_path) == finished


@pytest.mark.parametrize(
    "make", [lambda f: DiskFull(f, 6), lambda f: Truncating(f, 6, 1000)], ids=["full", "cut"]
)
def test_full_disk_for_the_finished_drafter(
    refused: Run,
    tmp_path: Path,
    arguments: list[str],
    finished: bytes,
    make: Callable[[Any], Any],
) -> None:
    """Three checkpoints are good; the work must not be lost, and no half drafter appear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", make(mx.save_safetensors))
        refused(train_drafter.main, *arguments, alone=False)
    assert not (tmp_path / "drafter").exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["drafter.partial", "drafter.responses.jsonl"]
    assert resumed(arguments, tmp_path) == finished


def test_full_disk_for_the_responses(
    refused: Run, tmp_path: Path, arguments: list[str], finished: bytes
) -> None:
    """The first batch is written, the second one meets a full disk."""
    opened, batches = Path.open, []

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.suffix == ".jsonl" and "a" in mode:
            batches.append(path)
            if len(batches) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        sentence = refused(train_drafter.main, *arguments, alone=False)
    assert len(batches) == 2
    assert "No space left on device" in sentence
    assert resumed(arguments, tmp_path) == finished


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--learning-rate 0.5", r"training.learning_rate was 0.001, is 0.5"),
        ("--seed 9", r"seed was 0, is 9"),
        ("--temperatures 0.5", r"temperatures was \[0.0, 1.0\], is \[0.5\]"),
        ("--exit-dim 48", r"exit_dim was 32, is 48"),
        ("--max-prompts 3", r"max_prompts was 4, is 3"),
        ("--prompt-tokens 4", r"prompt_tokens was 5, is 4"),
    ],
)
def test_resume_with_changed_settings(
    refused: Run, tmp_path: Path, arguments: list[str], flags: str, difference: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", DiskFull(mx.save_safetensors, 2))
        refused(train_drafter.main, *arguments, alone=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    changes = [*arguments, *flags.split(), "--resume"]
    sentence = refused(train_drafter.main, *changes, alone=False)
    assert re.search(difference, sentence), sentence
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


DAMAGED = ["settings.json", "log.jsonl", "network.safetensors", "optimizer.safetensors"]


@pytest.mark.parametrize("name", DAMAGED)
def test_resume_from_damaged_files(
    refused: Run,
    tmp_path: Path,
    arguments: list[str],
    finished: bytes,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """A machine that lost its power leaves half a file; it is named, or there is a way without."""
    arguments += ["--evaluate-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", DiskFull(mx.save_safetensors, 4))
        refused(train_drafter.main, *arguments, alone=False)
    *_, path = sorted((tmp_path / "drafter.partial").rglob(name))
    cut(0.5)(path)
    status = train_drafter.main([*arguments, "--resume"])
    err = capsys.readouterr().err
    if status == 0:
        assert (tmp_path / "drafter" / "model.safetensors").read_bytes() == finished
    else:
        assert status == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert path.name in err.splitlines()[-1]


def test_unfinished_training_without_resume(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "drafter.partial").mkdir()
    sentence = refused(train_drafter.main, *arguments)
    assert "drafter.partial holds an unfinished training; add --resume" in sentence


@pytest.mark.parametrize(
    "content",
    [
        b'{"target": {"hidden_size": 64}, "config": {}}\n',
        b"once upon a time\n",
        b"[]\n",
        b"\xff\n",
    ],
)
def test_responses_that_are_none(
    refused: Run, tmp_path: Path, arguments: list[str], content: bytes
) -> None:
    """Neither another target's, nor any other file; and it is not touched."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    flags = [*arguments, "--responses", path]
    sentence = refused(train_drafter.main, *flags, alone=False)
    assert "answers.jsonl" in sentence
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_responses_in_a_folder_that_is_not_there(
    refused: Run, tmp_path: Path, arguments: list[str]
) -> None:
    path = tmp_path / "no" / "answers.jsonl"
    sentence = refused(train_drafter.main, *arguments, "--responses", path, alone=False)
    assert "answers.jsonl" in sentence
    assert list(tmp_path.iterdir()) == []


def test_start_from_another_shape(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    arguments += ["--model", str(TARGET)]
    sentence = refused(train_drafter.main, *arguments, "--start-from", DRAFTER, alone=False)
    assert "shape" in sentence
    assert list(tmp_path.iterdir()) == []


def test_start_from_nothing(refused: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert "there is no folder" in refused(train_drafter.main, *arguments, "--start-from", "none")
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


def test_benchmark_of_a_model_without_drafter(refused: Run) -> None:
    assert "needs a drafter" in refused(benchmark.main, "--model", TARGET)


# ------------------------------------------------------------------------------- the Python side


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


def test_drafter_folder_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = RecurrentDrafter(RecurrentDrafterConfig(384, 4096, 64, 1, draft_vocab_size=512))
    folder = tmp_path / "drafter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", DiskFull(os.replace, 0))
        with pytest.raises((OSError, InputError)):
            save_drafter(folder, network, {"hidden_size": 384, "vocab_size": 4096}, {})
    assert not folder.exists()
    save_drafter(folder, network, {"hidden_size": 384, "vocab_size": 4096}, {"README.md": "hi"})
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    model, tokenizer = mlx_distill.load(TARGET)
    drafter = mlx_distill.load_drafter(folder, model)
    responses = mlx_distill.stream_generate(model, tokenizer, "Once", max_tokens=4)
    assert len(list(islice(responses, 4))) == 4
    with pytest.raises(InputError, match="tokenizer hash is None"):
        mlx_distill.load_drafter(folder, model, tokenizer)
    assert drafter.config.draft_vocab_size == 512
