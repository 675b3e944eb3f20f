"""The models of the tests in half precision are loaded as they are stored, and say something."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import REPOSITORY, ModelIn
from half_models import TYPES
from mlx import nn

from mlx_distill import checkpoint

STORED = {"float16": mx.float16, "bfloat16": mx.bfloat16, "4-bit": mx.bfloat16}


@pytest.mark.parametrize("name", ["tiny", "stories-4m", "stories-14m"])
@pytest.mark.parametrize("kind", TYPES)
def test_weights_keep_the_type_of_their_file(
    name: str, kind: str, as_on_a_gpu: None, model_in: ModelIn
) -> None:
    model, tokenizer = checkpoint.load(model_in(name, kind))
    logits = model(mx.array([tokenizer.encode("Once upon a time")]))[0, -1]
    assert logits.dtype == STORED[kind]
    assert isinstance(model["model"].embed_tokens, nn.QuantizedEmbedding) == (kind == "4-bit")
    if name != "tiny":
        assert tokenizer.decode([logits.argmax().item()]) in (",", "there")


def test_without_the_fixture_weights_are_float32(model_in: ModelIn) -> None:
    model, _ = checkpoint.load(model_in("tiny", "float16"))
    assert model(mx.array([[1, 2]])).dtype == mx.float32


def test_a_tiny_model_has_clear_distributions(tiny_on_a_gpu: Path) -> None:
    model, _ = checkpoint.load(tiny_on_a_gpu)
    logits = model(mx.array([[1, 2, 3, 4]]))[0].astype(mx.float32)
    largest = mx.softmax(logits, axis=-1).max(axis=-1)
    assert mx.all((largest > 0.01) & (largest < 0.99)), largest


def test_a_command_in_a_process_of_its_own_loads_them_so(model_in: ModelIn) -> None:
    program = REPOSITORY / "tests" / "stored_types.py"
    arguments = ["--model", model_in("tiny", "bfloat16"), "--max-tokens", "2", "--json"]
    done = subprocess.run(
        [sys.executable, program, "generate", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["generation_tokens"] == 2
