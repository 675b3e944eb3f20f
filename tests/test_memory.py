"""What a distillation says that it needs, against what it takes."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill.arrays import num_bytes
from mlx_distill.checkpoint import load
from mlx_distill.data.texts import Text
from mlx_distill.distillation.memory import memory_estimate
from mlx_distill.distillation.training import distill
from mlx_distill.training.config import TrainingConfig

MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.parametrize(
    ("kind", "batch_size", "length"),
    [("full", 2, 64), ("full", 8, 256), ("lora", 2, 256), ("4-bit lora", 8, 64)],
)
def test_estimate_is_the_peak(kind: str, batch_size: int, length: int, tmp_path: Path) -> None:
    teacher, student = load(MODELS / "stories-14m")[0], load(MODELS / "stories-4m")[0]
    if kind == "4-bit lora":
        nn.quantize(student, 32, 4)
    if kind != "full":
        student.freeze()
        linear_to_lora_layers(student, 1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    random = np.random.default_rng(0)
    texts = [Text(random.integers(3, 4096, length).tolist()) for _ in range(batch_size)]
    said = memory_estimate(student, [teacher], batch_size, length, False)
    found = re.search(r"about ([0-9.]+) GB", said)
    assert found
    mx.eval(student.parameters(), teacher.parameters())
    networks = num_bytes([student.parameters(), teacher.parameters()])
    before = mx.get_active_memory() - networks  # what other tests left
    mx.reset_peak_memory()
    training = TrainingConfig(steps=2)
    distill(
        student,
        teacher,
        texts,
        folder=tmp_path,
        training=training,
        batch_size=batch_size,
        quiet=True,
    )
    assert float(found[1]) * 1e9 == pytest.approx(mx.get_peak_memory() - before, rel=0.15)
