"""How long a text may be: declared, stretched, and where a table of positions ends."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from tiny_models import tiny_model

from mlx_distill.target.context import context_length, position_limit


def declaring(**arguments: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    object.__setattr__(model, "args", SimpleNamespace(**arguments))
    return model


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 32, "n_ctx": 32}, 32),
        ({"text_config": {"max_position_embeddings": 256}}, 256),
        ({"text_config": SimpleNamespace(max_position_embeddings=256)}, 256),
        ({"max_position_embeddings": None, "max_seq_len": True}, None),
        # The declared limit may be the one before the stretch, or the one after it.
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 4096, "rope_scaling": YARN}, 4096),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": YARN}}, 2048),
        ({"text_config": {"max_position_embeddings": 512, "rope_scaling": YARN}}, 2048),
        ({"max_position_embeddings": 300, "rope_scaling": {"type": "linear", "factor": 2.5}}, 750),
        # Llama 3.2: the declared limit is the stretched one, whatever the factor.
        (
            {
                "max_position_embeddings": 131_072,
                "rope_scaling": {**YARN, "rope_type": "llama3", "factor": 32.0},
            },
            131_072,
        ),
        ({"max_position_embeddings": 8, "rope_scaling": {"type": "yarn", "factor": "x"}}, 8),
        ({"max_position_embeddings": 8, "rope_scaling": "yarn"}, 8),
    ],
)
def test_context_length(arguments: dict[str, Any], expected: int | None) -> None:
    assert context_length(declaring(**arguments)) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", "gpt2", "mistral3"])
def test_context_of_models(name: str) -> None:
    assert context_length(tiny_model(name)) == 256


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv7"])
def test_states_have_no_context(name: str) -> None:
    """Mamba 2's class declares 2,056 tokens where its configuration says nothing."""
    assert context_length(tiny_model(name)) is None


@pytest.mark.parametrize(
    ("name", "rows"),
    [("gpt2", 256), ("gpt_bigcode", 256), ("llama", None), ("gemma3n", None), ("gptj", None)],
)
def test_rows_of_a_table_of_positions(name: str, rows: int | None) -> None:
    assert position_limit(tiny_model(name)) == rows


def test_rows_of_a_table_that_begins_later_or_is_quantised() -> None:
    """OPT's kind: the first two rows are none of a position."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(8, 64)
            self.positions = nn.Embedding(40, 64)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.tokens(tokens) + self.positions(mx.arange(tokens.shape[1]) + 2)

    model = Offset()
    assert position_limit(model) == 38
    nn.quantize(model, bits=4)
    assert position_limit(model) == 38
