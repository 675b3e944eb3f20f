"""Folders and repositories that mlx-lm loads, and so do we."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx_lm
import pytest
from damage import TARGET, changed
from mlx.utils import tree_flatten
from tiny_models import tiny_config, tiny_model

import mlx_distill
from mlx_distill import InputError

SMALL = mlx_distill.checkpoint.bundled("stories-4m")
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "NAME"}

    def __init__(self, vocab_file=None, **more):
        more.pop("tokenizer_file", None)
        super().__init__(tokenizer_file=vocab_file, **more)
"""


def test_masks_beside_the_weights_are_no_part_of_the_model(tmp_path: Path) -> None:
    """Pythia's files hold the causal mask of every layer, which mlx-lm leaves out."""
    model, config = tiny_model("gpt_neox"), tiny_config("gpt_neox")
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    weights["layers.0.attention.bias"] = mx.ones((1, 1, 64, 64), dtype=mx.bool_)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TARGET / file, tmp_path)
    loaded, _ = mlx_distill.load(tmp_path)
    tokens = mx.array([[3, 1, 4]])
    assert mx.array_equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("name", ["tokenizer.jsonl", "own.tokens"])
def test_tokenizers_with_code_and_files_of_their_own(tmp_path: Path, name: str) -> None:
    """Kimi's, Plamo's: the code is in tokenization_*.py, the tokens in a file of any name."""
    folder = changed(SMALL, tmp_path / "model")
    ids = mlx_distill.load(folder)[1].encode("Once upon a time")
    (folder / "tokenizer.json").rename(folder / name)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER.replace("NAME", name))
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert mlx_distill.load(folder, trust_remote_code=True)[1].encode("Once upon a time") == ids
    with pytest.raises(InputError, match="only with --trust-remote-code"):
        mlx_distill.load(folder)


def test_a_repository_of_the_hub_by_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one than the newest was asked for; the oldest names have no owner."""
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(SMALL)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    mlx_distill.load("somebody/some-model", revision="v1.0")
    mlx_distill.load("gpt2")
    assert asked == [("somebody/some-model", "v1.0"), ("gpt2", None)]


def test_fields_of_a_configuration_are_replaced() -> None:
    changes = {"rope_theta": 5e5}
    model, _ = mlx_distill.load(SMALL, model_config=changes)
    theirs = mlx_lm.load(str(SMALL), model_config=changes)[0]
    assert model.args.rope_theta == theirs.args.rope_theta == 5e5


@pytest.mark.parametrize("text", ["", '{"eos_token_id": ', '\ufeff{"eos_token_id": 5}'])
def test_broken_settings_of_generating_are_passed_over_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """As mlx-lm does, which also takes a mark of the byte order for no JSON."""
    folder = changed(SMALL, tmp_path / "model")
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    _, tokenizer = mlx_distill.load(folder)
    assert tokenizer.eos_token_ids == mlx_lm.load(str(folder))[1].eos_token_ids
    said = capsys.readouterr().err
    assert "generation_config.json is passed over: " in said
    assert said.count("\n") == 1
