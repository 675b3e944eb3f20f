"""Exported students are models of mlx-lm; an export that fails leaves nothing behind."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from students import SMALL, TOKENS, arrays, clear, learn
from tiny_models import tiny_config

import mlx_distill
from mlx_distill import InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.students import from_config
from mlx_distill.hashes import tokenizer_hash


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return the folder of a student."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    files = {"README.md": "# Ä student\n", "curves.png": b"\x89PNG\xff"}
    student = clear(from_config(SMALL))
    own = compact(student, SMALL, ExportConfig("float16"))
    export(folder, student, own, tokenizer, files)
    return folder


def test_exported_folder_is_a_model(exported: Path, tokenizer: Any) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= names
    assert not exported.with_name("student.writing").exists()
    config = json.loads((exported / "config.json").read_text())
    assert config == {k: v for k, v in SMALL.items() if k != "torch_dtype"} | {"dtype": "float16"}
    assert (exported / "README.md").read_text(encoding="utf-8") == "# Ä student\n"
    assert (exported / "curves.png").read_bytes() == b"\x89PNG\xff"
    model, again = mlx_lm.load(str(exported))[:2]
    assert {x.dtype for x in arrays(model).values()} == {mx.float16}
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    for text in ("Once upon a time", " two  spaces", "Ä", "<s>"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    found, _ = mlx_distill.load(exported)
    np.testing.assert_allclose(found(TOKENS), clear(from_config(SMALL))(TOKENS), atol=0.05)


def test_exported_student_writes_as_a_target(exported: Path) -> None:
    model, tokenizer = mlx_distill.load(exported)
    expected = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    assert len(expected) > 3
    found = mlx_distill.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    assert found == expected


def test_exported_student_drafts_in_mlx_lm(exported: Path) -> None:
    draft, _ = mlx_distill.load(exported)
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    expected = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    stream = mlx_lm.stream_generate(
        model, tokenizer, "Once upon a time", max_tokens=12, draft_model=draft, num_draft_tokens=2
    )
    assert "".join(response.text for response in stream) == expected


def test_a_type_that_is_none_is_left_aside() -> None:
    student = from_config(SMALL)
    assert compact(student, {**SMALL, "torch_dtype": ["x"]}, ExportConfig())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_of_the_type_that_is_said(dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    student = from_config(SMALL)
    export(
        tmp_path / "student", student, compact(student, SMALL, ExportConfig(dtype)), tokenizer, {}
    )
    saved = mx.load(str(tmp_path / "student" / "model.safetensors"))
    assert isinstance(saved, dict)
    assert {str(x.dtype) for x in saved.values()} == {f"mlx.core.{dtype}"}
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h"])
def test_weights_that_mlx_lm_never_rounds_keep_their_type(name: str) -> None:
    config = tiny_config(name)
    student = from_config(config)
    spared = [name for name in arrays(student) if not student.cast_predicate(name)]  # pyright: ignore
    before = arrays(student)
    assert spared
    compact(student, config, ExportConfig("bfloat16"))
    for name, array in arrays(student).items():
        assert array.dtype == (mx.float32 if name in spared else mx.bfloat16)
        assert name not in spared or mx.array_equal(array, before[name]).item()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_half_precision(
    dtype: str, bits: int | None, tmp_path: Path, tokenizer: Any
) -> None:
    """Off a GPU MLX has no products of experts but in float32, and what was learned was lost."""
    config = tiny_config("qwen3_moe") | {"vocab_size": 4096, "moe_intermediate_size": 64}
    student = from_config(config)
    own = compact(student, config, ExportConfig(dtype, bits))
    export(tmp_path / "student", student, own, tokenizer, {})
    assert mx.isfinite(mlx_distill.load(tmp_path / "student")[0](TOKENS)).all().item()
    experts = from_config(config)
    experts.model.layers[1].mlp.switch_mlp.up_proj.weight *= np.inf
    own = compact(experts, config, ExportConfig(dtype))
    with pytest.raises(InputError, match=f"not numbers in .*{dtype}"):
        export(tmp_path / "other", experts, own, tokenizer, {})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_export(bits: int, tmp_path: Path, tokenizer: Any) -> None:
    expected = clear(from_config(SMALL))

    def fits(_: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0

    nn.quantize(expected, bits=bits, class_predicate=fits)
    student = clear(from_config(SMALL))
    export(
        tmp_path / "student",
        student,
        compact(student, SMALL, ExportConfig("float32", bits)),
        tokenizer,
        {},
    )
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    q_proj = model.layers[0].self_attn.q_proj
    assert isinstance(q_proj, nn.QuantizedLinear)
    assert q_proj.bits == bits
    assert mx.array_equal(model(TOKENS), expected(TOKENS)).item()


def test_student_that_computed_twice_is_exported_as_any(tmp_path: Path, tokenizer: Any) -> None:
    names = []
    for twice in (False, True):
        student = from_config(SMALL)
        if twice:
            checkpoint_layers(student)
        learn(tmp_path / f"work-{twice}", student, from_config(SMALL, seed=1))
        folder = tmp_path / f"student-{twice}"
        own = compact(student, SMALL, ExportConfig("float32"))
        export(folder, student, own, tokenizer, {})
        model, _ = mlx_lm.load(str(folder))[:2]
        names.append(arrays(model))
    assert set(names[0]) == set(names[1])
    for name, x in names[0].items():
        np.testing.assert_allclose(names[1][name], x, atol=1e-3, err_msg=name)


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["weights", "short weights", "config", "tokenizer", "card"])
def test_failing_export_leaves_nothing_behind(
    fails: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("[save] Failed to write 1048576 bytes")

    def short(path: str, *args: Any, **options: Any) -> None:
        save(path, *args, **options)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) - 8)

    files = {"README.md": "card"}
    student = from_config(SMALL)
    config = compact(student, SMALL, ExportConfig("float32"))
    with monkeypatch.context() as patch:
        if fails == "weights":
            patch.setattr(mx, "save_safetensors", broken)
        elif fails == "short weights":
            patch.setattr(mx, "save_safetensors", short)
        elif fails == "config":
            patch.setattr("mlx_distill.distillation.exporting.save_config", full_disk)
        elif fails == "tokenizer":
            kind = type(tokenizer.save_pretrained.__self__)  # what the wrapper wraps
            patch.setattr(kind, "save_pretrained", full_disk)
        else:
            patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(InputError, match="student could not be written: ") as error:
            export(tmp_path / "student", student, config, tokenizer, files)
        reasons = {"weights": "Failed to write", "short weights": "is damaged"}
        assert reasons.get(fails, "No space left on device") in str(error.value)
    assert not list(tmp_path.iterdir())
    export(tmp_path / "student", student, config, tokenizer, files)  # there is room again
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    assert mx.array_equal(model(TOKENS), from_config(SMALL)(TOKENS)).item()


def test_export_is_not_confused_by_what_a_kill_left(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "student.writing").mkdir()
    (tmp_path / "student.writing" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export(tmp_path / "student", from_config(SMALL), SMALL, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert len(list((tmp_path / "student").glob("*.safetensors"))) == 1
