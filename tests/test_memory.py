"""What a distillation says that it needs, against what it takes."""

import gc
import importlib
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from half_models import tiny_llama
from mlx import nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill import machine
from mlx_distill.arrays import num_bytes
from mlx_distill.checkpoint import load
from mlx_distill.data.texts import Text
from mlx_distill.distillation import memory
from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.distillation.memory import Batch, Work, memory_estimate
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.training import distill
from mlx_distill.errors import InputError
from mlx_distill.training.config import TrainingConfig

MODELS = Path(__file__).parents[1] / "models"


RANDOM = np.random.default_rng(0)


def some_texts(count: int, length: int) -> list[Text]:
    return [Text(RANDOM.integers(3, 4096, length).tolist()) for _ in range(count)]


# What a kind's words say about the student's shape.
DEEP = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 512}
WIDE = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 32768}


def teacher_of(kind: str, part: Path) -> nn.Module:
    """Return a teacher for a kind of students; it is small where it would hide what they take."""
    if "deep" in kind or "wide" in kind:
        return tiny_llama(**(WIDE if "wide" in kind else {}))
    return load(part)[0]


def student_of(kind: str) -> nn.Module:
    """Return a small student of the shape, in the type and with the trained parameters of a kind.

    Without a shape it has one layer.
    """
    if "deep" in kind or "wide" in kind:
        student = tiny_llama(**(WIDE if "wide" in kind else DEEP))
    else:
        student = load(MODELS / "stories-4m")[0]
    if "bfloat16" in kind:
        student.set_dtype(mx.bfloat16)
    if "4-bit" in kind:
        nn.quantize(student, 32, 4)
    if "lora" in kind:
        student.freeze()
        linear_to_lora_layers(student, 1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    if "checkpointed" in kind:
        checkpoint_layers(student)
    return student


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("deep", Work(Batch(3, 144))),
        ("full", Work(Batch(2, 96), accumulated=True)),
        ("full bfloat16", Work(Batch(2, 32))),
        ("deep checkpointed", Work(Batch(3, 144), checkpointed=True)),
        ("lora", Work(Batch(2, 128))),
        ("4-bit lora", Work(Batch(4, 32))),
        ("lora", Work(Batch(1, 20), written=Batch(64, 20))),
        ("wide lora", Work(Batch(1, 4), judged=Batch(2, 64))),
        ("wide lora", Work(Batch(1, 4), written=Batch(64, 4))),
    ],
)
def test_estimate_is_the_peak(
    kind: str, work: Work, bundled_part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is the largest: gradients, an update, held-out texts, or what is written."""
    teacher, student = teacher_of(kind, bundled_part), student_of(kind)
    # In words it is rounded to 10 MB, which is a seventh of the smallest.
    monkeypatch.setattr(memory, "in_words", lambda parts, _: str(sum(parts.values())))
    estimate = int(memory_estimate(student, [teacher], work))
    mx.eval(student.parameters(), teacher.parameters())
    networks = num_bytes([student.parameters(), teacher.parameters()])
    gc.collect()  # or what others left is freed meanwhile
    mx.synchronize()
    before = mx.get_active_memory() - networks  # what other tests left
    mx.reset_peak_memory()
    # What the first step leaves is more than a little of others; texts that are written differ.
    steps = 1 if "lora" in kind and not work.written else 2
    count = max(2 * work.learned.size, work.written.size if work.written else 0)
    distill(
        student,
        teacher,
        some_texts(count, work.learned.width),
        folder=tmp_path,
        valid=some_texts(work.judged.size, work.judged.width) if work.judged else None,
        training=TrainingConfig(steps=steps, accumulate=2 if work.accumulated else 1),
        batch_size=work.learned.size,
        on_policy=OnPolicyConfig(on_policy=1.0, rollout_max_tokens=4) if work.written else None,
        quiet=True,
    )
    # How far the host is ahead of the processor decides how much there is at once; where layers are
    # computed again, one of 0.80, 0.93 and 1.00 of the estimate was measured from run to run.
    least = 0.75 if "checkpointed" in kind else 0.85
    assert least < (mx.get_peak_memory() - before) / estimate < 1.15


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**8)
    with pytest.raises(InputError, match=r"this machine has 0\.1 GB; use a smaller --batch-size"):
        memory_estimate(student_of("full"), [], Work(Batch(8, 256)))


@pytest.mark.parametrize("command", ["cache", "evaluate"])
def test_reading_is_estimated(
    command: str, bundled_part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four long texts at once, by a teacher whose answers are kept, or by two models."""
    data = tmp_path / "data.jsonl"
    count = 6 if command == "cache" else 4
    story = "Once upon a time there was a dog. " * 30
    data.write_text("".join(json.dumps({"text": f"{n}. {story}"}) + "\n" for n in range(count)))
    teacher = bundled_part if command == "cache" else MODELS / "stories-14m"
    flags = ["--teacher", str(teacher), "--data", str(data), "--batch-size", "4"]
    gc.collect()
    before = mx.get_active_memory()  # what other tests left
    mx.reset_peak_memory()
    if command == "cache":
        flags += ["--cache-teacher", str(tmp_path / "cache"), "--held-out", "2", "--quiet"]
        module = "mlx_distill.distill"
    else:
        flags += ["--student", f"small={MODELS / 'stories-4m'}", "--speed-tokens", "0"]
        module = "mlx_distill.evaluate"
    assert importlib.import_module(module).main(flags) == 0
    found = re.search(r"about ([0-9.]+) GB", capsys.readouterr().err)
    assert found
    assert float(found[1]) * 1e9 == pytest.approx(mx.get_peak_memory() - before, rel=0.15)
