"""Small models and texts that are evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import tiny_config

from mlx_distill.checkpoint import bundled
from mlx_distill.data.texts import Text

BUNDLED = bundled("stories-14m")


STORIES = [
    "Once upon a time there was a little girl who had a red ball.",
    "Tom and his dog went to the park. They saw a big tree.",
    "The sun was hot, so Lily drank water.",
    "One day a cat found a hat. The cat put on the hat and went to see its friend, the frog.",
]


def texts_of(num_texts: int, seed: int = 0, vocab_size: int = 97) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 20, size=num_texts)
    return [
        Text.behind(random.integers(vocab_size, size=length).tolist(), 1 + number % 2)
        for number, length in enumerate(lengths)
    ]


def tiny_folder(where: Path, seed: int, vocab_size: int = 4096) -> Path:
    """Write a tiny model with the bundled tokenizer; the first rows depend on the seed alone."""
    where.mkdir()
    config = tiny_config("llama") | {"vocab_size": vocab_size}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    weights: dict[str, Any] = {}
    for name, value in tree_flatten(model.parameters()):
        assert isinstance(value, mx.array)
        weights[name] = 0.2 * mx.random.normal(value.shape) if value.ndim > 1 else value
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = mx.random.normal((5000, 64), key=mx.random.key(seed))
        weights[name] = 0.2 * rows[:vocab_size]
    mx.save_safetensors(str(where / "model.safetensors"), weights, {"format": "mlx"})
    (where / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, where / file)
    return where


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(where / name, seed) for seed, name in enumerate("abc")}
