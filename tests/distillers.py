"""Small students, teachers and texts, and what runs a distillation of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from tiny_models import tiny_config, tiny_model

from mlx_distill.data.texts import Text
from mlx_distill.distillation.distiller import Distiller
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.students import from_config
from mlx_distill.distillation.teachers import (
    LiveTeacher,
)
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.distillation.training import Distilled, distill
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.journal import LOG

V = 97
HALF = OnPolicyConfig(on_policy=0.5)
MIXED = ["forward_kl:weight=0.7,temperature=2", "hard:weight=0.3", "reverse_kl:weight=0.2"]


def make_texts(count: int, seed: int = 0, longest: int = 30, vocab_size: int = V) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = [longest, *random.integers(5, longest + 1, count - 1).tolist()]
    return [Text.behind(random.integers(1, vocab_size, n).tolist(), 1 + n // 4) for n in lengths]


TEXTS = make_texts(12)


def small(name: str = "llama", seed: int = 3, **fields: Any) -> Any:
    """Return a student of half the teacher's width."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
    return from_config(tiny_config(name) | sizes | fields, seed)


def terms(texts: Sequence[str]) -> list[LossTerm]:
    return [LossTerm.parse(text) for text in texts]


def make(losses: Sequence[str], batch: Any, student: Any = None, teacher: Any = None) -> Distiller:
    student, teacher = student or small(), teacher or LiveTeacher([tiny_model("llama")])
    made = Distiller(student, teacher, terms(losses), batch, num_examples=12)
    student.train()
    return made


def value_and_grads(made: Distiller, batch: Any) -> tuple[float, float, dict[str, mx.array]]:
    """Return a batch's sum, count and gradients."""
    taught = made.teach(batch)
    (total, count, _), grads = value_and_grad(made.network, made.loss)(taught)
    mx.eval(total, count, grads)
    return total.item(), count.item(), dict(tree_flatten(grads))  # pyright: ignore


def assert_close(found: dict[str, mx.array], expected: dict[str, mx.array], tol: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = max(1e-3, mx.abs(gradient).max().item())  # pyright: ignore
        np.testing.assert_allclose(found[name], gradient, atol=tol * scale, err_msg=name)


def bits(network: nn.Module) -> dict[str, bytes]:
    arrays: dict[str, Any] = dict(tree_flatten(network.parameters()))
    return {name: bytes(memoryview(x)) for name, x in arrays.items()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if path.name == LOG:
        measured = [set(row.pop("measured")) for row in rows]
        assert all(one == {"tokens_per_second", "peak_memory_gb"} for one in measured)
    return rows


def run(folder: Path, student: Any, teacher: Any, texts: Any = None, **options: Any) -> Distilled:
    steps = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "learning_rate": 1e-2}
    training = TrainingConfig(**{**steps, **options.pop("training", {})})
    texts = TEXTS if texts is None else texts
    options = {"batch_size": 3, "quiet": True, "seed": 5, **options}
    return distill(student, teacher, texts, folder=folder, training=training, **options)
