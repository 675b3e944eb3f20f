"""What can be wrong with the folder of a model or a drafter, and what the commands then say."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
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
from half_models import REFERENCE
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import InputError, benchmark, train_drafter
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.target.target import Target

# The package has a function of that name, too.
generate = importlib.import_module("mlx_distill.generate")
DRAFTER = REFERENCE
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


def test_what_is_pickled_is_never_read(refused: Run, tmp_path: Path) -> None:
    folder = changed(TARGET, tmp_path / "model", model__safetensors=delete)
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "heads").mkdir()
    shutil.copy(file, tmp_path / "heads")
    named = [("--model", folder), ("--model", file), ("--drafter", file)]
    for flag, path in [*named, ("--drafter", tmp_path / "heads")]:
        sentence = refused(generate.main, flag, path)
        assert "pytorch_model.bin is pickled" in sentence
        assert "safetensors.torch.save_file" in sentence


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
    "another kind": (
        {"config__json": set_fields(model_type="medusa")},
        "holds a medusa, not a .* convert --to ours",
    ),
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
