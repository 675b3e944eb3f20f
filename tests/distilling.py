"""A small world for the command ``distill``: teachers, students, texts, and what runs it."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mlx_lm
import pytest
import yaml
from mlx.utils import tree_flatten, tree_map
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill.checkpoint import bundled
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.students import from_config

# The package has a function of that name, too.
command = importlib.import_module("mlx_distill.distill")
main = command.main

STORIES = [
    "Once upon a time there was a little dog. It ran to the park.",
    "Ben had a red kite. It flew high.",
    "Lily found a needle in her room. She gave it to mom.",
    "The cat sat on the mat and slept all day long.",
    "Tom and Sue went to the sea. They saw a big fish.",
    "A bird sang in the tree.",
    "One day it rained. The frog was happy.",
    "Mom made soup. It was hot, so they waited.",
    "The sun was warm. Max played with a ball.",
    "There was a cow named Moo. She liked grass.",
    "Anna lost her hat. A boy found it.",
    "The old man had a small boat.",
]
HELD_OUT = ["The dog had a ball. It was red.", "Lily and Ben went home.", "It was a sunny day."]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
TINY = LLAMA | {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
STEPS = ["--steps", "6", "--checkpoint-every", "2", "--evaluate-every", "3", "--quiet"]
SIZES = ["--batch-size", "3", "--learning-rate", "0.01", "--seed", "4"]
FILES = {"config.json", "model.safetensors", "tokenizer_config.json", "README.md", "config.yaml"}
FILES |= {"training.json", "log.jsonl", "log.csv", "curves.png"}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ask no hub, and look into no cache of it."""
    # The hub's client reads the environment only once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: that takes as long as all else."""
    draw_nothing(monkeypatch)


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw: Any = lambda rows, path, title: path.write_bytes(b"")  # noqa: E731
    monkeypatch.setattr("mlx_distill.distillation.run.draw_curves", draw)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, config: dict[str, Any], seed: int, tokenizer: Any) -> Path:
    """Write a model of random weights that are wide enough for clear distributions."""
    model = from_config(config, seed)
    model.update(tree_map(lambda x: 3 * x if x.ndim > 1 else x, model.parameters()))
    own = compact(model, config, ExportConfig("float32"))
    export(folder, model, own, tokenizer, {})
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


def byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return a folder with teachers, a student's configuration, a student, and texts."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "teacher", LLAMA, 1, tokenizer)
    save(folder / "second", LLAMA, 2, tokenizer)
    save(folder / "bytes", LLAMA | {"vocab_size": 258}, 1, byte_tokenizer())
    save(folder / "student", TINY, 3, tokenizer)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    write_rows(folder / "texts" / "train.jsonl", [{"text": text} for text in STORIES])
    write_rows(folder / "texts" / "valid.jsonl", [{"text": text} for text in HELD_OUT])
    return folder


def arguments(world: Path, output: Path, *more: Any) -> list[str]:
    common = ["--teacher", world / "teacher", "--student-config", world / "tiny.json"]
    rest = ["--data", world / "texts", "--output", output, *SIZES, *STEPS, *more]
    return [str(argument) for argument in [*common, *rest]]


def learn(world: Path, output: Path, *more: Any) -> Path:
    """Distil; return the student's folder."""
    assert main(arguments(world, output, *more)) == 0
    assert not output.with_name(output.name + ".partial").exists()
    return output


@pytest.fixture(scope="session")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student whose training was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return learn(world, tmp_path_factory.mktemp("finished") / "student")


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(set(row.pop("measured")) == {"tokens_per_second", "peak_memory_gb"} for row in rows)
    return rows


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def arrays_of(folder: Path) -> dict[str, Any]:
    model = mlx_lm.load(str(folder))[0]
    return dict(tree_flatten(model.parameters()))


def same_result(one: Path, other: Path) -> bool:
    return weights_of(one) == weights_of(other) and log_of(one) == log_of(other)


Refuse = Callable[..., str]


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return what runs a command that has to refuse, and returns the sentence."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        _, err = capsys.readouterr()
        lines = err.replace("\r", "\n").strip().splitlines()
        assert "Traceback" not in err
        assert lines[-1].startswith("error: "), err
        assert sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1].removeprefix("error: ")

    return run


def without(argv: list[str], flag: str, count: int = 1) -> list[str]:
    at = argv.index(flag)
    return argv[:at] + argv[at + 1 + count :]


def write_yaml(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path
