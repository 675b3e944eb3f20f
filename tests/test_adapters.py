"""Adapters of a student: they learn alone, over packed weights too, and are merged or kept."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ModelIn
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from students import SMALL, TEXTS, TOKENS, arrays, bits, clear, learn, trained
from tiny_models import tiny_config, tiny_model

from mlx_distill import InputError, TrainingConfig
from mlx_distill.checkpoint import load
from mlx_distill.distillation import parts
from mlx_distill.distillation.adapters import AdapterConfig, merge_adapters
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.students import from_config
from mlx_distill.distillation.training import distill
from mlx_distill.training.checkpoints import checkpoints


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_adapters_learn(kind: str, tmp_path: Path) -> None:
    student = tiny_model("llama")
    base = bits(student)
    AdapterConfig(kind, lora_rank=4, lora_layers=2).apply(student)
    names = {".lora_a", ".lora_b", *((".m",) if kind == "dora" else ())}
    assert {name[name.rindex(".") :] for name in trained(student)} == names
    assert {name.split(".")[2] for name in trained(student)} == {"1", "2"}
    learn(tmp_path, student, tiny_model("llama", seed=1))
    after = bits(student)
    for name, x in base.items():
        inner = re.sub(r"(.*)\.(weight|bias)$", r"\1.linear.\2", name)
        assert after.get(name, after.get(inner)) == x, name
    saved = mx.load(str(checkpoints(tmp_path)[-1] / "network.safetensors"))
    assert set(saved) == {f"student.{name}" for name in trained(student)}
    size = (checkpoints(tmp_path)[-1] / "network.safetensors").stat().st_size
    assert size < 0.5 * sum(map(len, base.values()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_killed_adapters_go_on_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    found = []
    for name in ("whole", "parts"):
        for steps in (4,) if name == "whole" else (2, 4):
            student = tiny_model("llama")
            mx.random.seed(len(found) + steps)  # of whatever ran before
            AdapterConfig(kind, lora_rank=4).apply(student)
            learn_some(tmp_path / name, student, steps)
        found.append(bits(student))
    assert found[0] == found[1]


class Killed(Exception):
    pass


def learn_some(folder: Path, student: Any, steps: int) -> None:
    class Kill:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == steps + 1:
                raise Killed

    training = TrainingConfig(steps=4, learning_rate=1e-2, checkpoint_every=2)
    teacher = tiny_model("llama", seed=1)
    try:
        distill(
            *(student, teacher, TEXTS),
            folder=folder,
            training=training,
            batch_size=2,
            callback=Kill(),
            quiet=True,
        )
    except Killed:
        assert steps < 4


def test_all_layers_have_adapters() -> None:
    student = tiny_model("llama")
    AdapterConfig("lora").apply(student)
    assert {name.split(".")[2] for name in trained(student)} == {"0", "1", "2"}
    whole = tiny_model("llama")
    AdapterConfig().apply(whole)
    assert set(trained(whole)) == set(arrays(whole))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fine_tune": "some"}, "fine_tune must be full, lora or dora, got some"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_layers": 0}, "lora_layers must be -1, or between 1 and 10,000, got 0"),
        ({"lora_layers": -2}, "lora_layers must be -1, or between 1 and 10,000, got -2"),
    ],
)
def test_adapters_that_mean_nothing(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        AdapterConfig(**fields)


def test_quantised_student_learns_by_adapters_alone() -> None:
    student = from_config(SMALL)
    compact(student, SMALL, ExportConfig(export_bits=4))
    with pytest.raises(InputError, match="a quantised student cannot be trained; train adapters"):
        AdapterConfig().apply(student)
    AdapterConfig("lora").apply(student)
    names = [name for name, _ in tree_flatten(student.trainable_parameters())]
    assert names
    assert all("lora" in name for name in names)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_models_whose_code_looks_into_a_layer(kind: str) -> None:
    """Step 1 ended in a traceback; of adapters of mlx-lm's it does, too."""
    with pytest.raises(InputError, match=f"cannot have adapters .{kind}.: .* no attribute"):
        AdapterConfig(kind).apply(tiny_model("gemma3n"))


@pytest.mark.parametrize("name", ["recurrent_gemma", "mistral4"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_models_whose_classes_leave_their_base_out(name: str, kind: str, tmp_path: Path) -> None:
    """They could not be frozen, nor be asked what of them is trained."""
    student, teacher = tiny_model(name), tiny_model(name, seed=1)
    AdapterConfig(kind).apply(student)
    learn(tmp_path / "work", student, teacher)
    assert not trained(teacher)


def test_more_adapters_than_layers() -> None:
    with pytest.raises(InputError, match="lora_layers is 4, the student has 3"):
        AdapterConfig("lora", lora_layers=4).apply(tiny_model("llama"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_answer_as_before(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    config = tiny_config("llama") | {"vocab_size": 4096}
    student = clear(from_config(config))
    plain = student(TOKENS)
    AdapterConfig(kind, lora_rank=4).apply(student)
    np.testing.assert_allclose(student(TOKENS), plain, atol=1e-4)
    learn(tmp_path / "work", student, clear(from_config(config, seed=1)))
    adapted = student(TOKENS)
    assert mx.abs(adapted - plain).max().item() > 0.1  # pyright: ignore
    num_values = sum(x.size for x in arrays(from_config(config)).values())
    export(
        tmp_path / "student",
        student,
        compact(student, config, ExportConfig("float32")),
        tokenizer,
        {},
    )
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    np.testing.assert_allclose(model(TOKENS), adapted, atol=2e-3)
    assert sum(x.size for x in arrays(model).values()) == num_values
    assert not any("lora" in name for name in arrays(model))
    merge_adapters(model)  # there are none left


def test_adapters_on_a_quantised_base(tmp_path: Path, tokenizer: Any) -> None:
    """As mlx-lm does: the base stays as it is, and merged weights are quantised again."""
    config = tiny_config("llama") | {"vocab_size": 4096}
    student = clear(from_config(config))
    nn.quantize(student, group_size=32, bits=8)
    config |= {"quantization": {"group_size": 32, "bits": 8}}
    AdapterConfig("lora", lora_rank=4).apply(student)
    assert all("lora" in name for name in trained(student))
    learn(tmp_path / "work", student, clear(from_config(tiny_config("llama"), seed=1)))
    adapted = student(TOKENS)
    export(
        tmp_path / "student",
        student,
        compact(student, config, ExportConfig("float32")),
        tokenizer,
        {},
    )
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    difference = mx.abs(nn.softmax(model(TOKENS)) - nn.softmax(adapted)).max().item()
    assert difference < 0.05  # pyright: ignore


def test_adapters_of_a_quantised_student_are_whole_where_it_is_not_exported_so(
    tmp_path: Path, model_in: ModelIn
) -> None:
    folder = model_in("tiny", "4-bit")
    known, _ = load(folder)
    config = AdapterConfig("lora")
    config.apply(known)
    mx.random.seed(1)
    known.update(tree_map(lambda x: 0.02 * mx.random.normal(x.shape), known.trainable_parameters()))
    config.save(known, tmp_path / "adapters")
    given = {"student": str(folder), "adapter_path": str(tmp_path / "adapters"), "data": ("x",)}
    tokens = mx.array([[5, 6, 7, 8, 9]])
    off = []
    for whole in (True, False):
        settings = DistillConfig(
            **given, adapter=config, export=ExportConfig(export_dequantized=whole)
        )
        student = parts._student(settings, [], parts.Opening())
        off.append(mx.abs(student.network(tokens) - known(tokens)).max().item())
    assert off[0] < 1e-4 < off[1]
