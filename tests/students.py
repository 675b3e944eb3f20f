"""Small networks of tests of students: what they are, what they learned."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from mlx_distill import TrainingConfig
from mlx_distill.data.texts import Text
from mlx_distill.distillation.training import distill

TOKENS = mx.array([[5, 9, 33, 2, 7], [60, 1, 1, 4, 90]])


RANDOM = np.random.default_rng(0)


TEXTS = [Text(RANDOM.integers(1, 97, n).tolist()) for n in (12, 9, 17, 20, 8, 11)]


SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def arrays(network: nn.Module) -> dict[str, Any]:
    return dict(tree_flatten(network.parameters()))


def trained(network: nn.Module) -> dict[str, Any]:
    return dict(tree_flatten(network.trainable_parameters()))


def bits(network: nn.Module) -> dict[str, bytes]:
    return {name: bytes(memoryview(x)) for name, x in arrays(network).items()}


def clear(network: nn.Module) -> nn.Module:
    """Widen random weights, so that some tokens are clearly the best ones."""
    network.update(tree_map(lambda x: 4 * x if x.ndim > 1 else x, network.parameters()))
    return network


def learn(folder: Path, student: Any, teacher: Any, **options: Any) -> None:
    steps = {"steps": 4, "learning_rate": 1e-2, "checkpoint_every": 2}
    training = TrainingConfig(**{**steps, **options})
    distill(
        student, teacher, TEXTS, folder=folder, training=training, batch_size=2, quiet=True, seed=1
    )


def logits(network: nn.Module) -> mx.array:
    """Return logits for a text that is longer than every window of the tiny models."""
    tokens = mx.array([[(7 * i) % 90 + 1 for i in range(40)]])
    return network(tokens, cache=make_prompt_cache(network))
