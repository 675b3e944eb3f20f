"""What a model supports is remembered, and found out again where anything may have changed it."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx import nn
from tiny_models import tiny_model

from mlx_distill import machine
from mlx_distill.errors import InputError
from mlx_distill.target import opening
from mlx_distill.target.memory import open_remembered
from mlx_distill.target.target import Target


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Return a list that grows with every call that tries something."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls, call = [], opening.call_on_text

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return call(*args, **kwargs)

    monkeypatch.setattr(opening, "call_on_text", counted)
    return calls


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "mlx_distill" / "opened").glob("*.json"))


@pytest.mark.parametrize(
    ("kind", "support"), [("llama", "row"), ("mamba", "row"), ("gpt_bigcode", "copies")]
)
def test_an_opened_model_is_not_tried_again(
    tries: list[int], tmp_path: Path, kind: str, support: str
) -> None:
    first = open_remembered(tiny_model(kind))
    assert tries
    tries.clear()
    again = open_remembered(tiny_model(kind))
    assert not tries
    assert first.support == again.support == support
    found = (first.reason, first.hidden_size, first.vocab_size)
    assert found == (again.reason, again.hidden_size, again.vocab_size)
    assert len(kept(tmp_path)) == 1
    assert Target.of(again.model) is again


def other_weights(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.update({"model": {"norm": {"weight": 1.5 * model.model.norm.weight}}})


def half_precision(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_dtype(mx.bfloat16)


def other_setting(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.layers[0].self_attn.scale *= 2


def other_version(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"mlx": "9.9"})


def other_rounding(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")


@pytest.mark.parametrize(
    "change", [other_weights, half_precision, other_setting, other_version, other_rounding]
)
def test_another_model_is_tried(
    tries: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object
) -> None:
    open_remembered(tiny_model("llama"))
    tries.clear()
    model = tiny_model("llama")
    change(model, monkeypatch)
    open_remembered(model)
    assert tries
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"support": "all"}', '{"support": "none"}', "{}"])
def test_what_cannot_be_used_is_tried_again(tries: list[int], tmp_path: Path, content: str) -> None:
    open_remembered(tiny_model("llama"))
    (file,) = kept(tmp_path)
    file.write_text(content)
    tries.clear()
    assert open_remembered(tiny_model("llama")).support == "row"
    assert tries
    assert file.read_text() == '{"support": "row"}\n'


def test_a_folder_that_cannot_be_written_keeps_nothing(tries: list[int], tmp_path: Path) -> None:
    (tmp_path / "mlx_distill").write_text("a file")
    assert open_remembered(tiny_model("llama")).support == "row"
    assert not kept(tmp_path)


def test_a_remembered_model_whose_logits_are_no_numbers(tries: list[int]) -> None:
    """The values that tell models apart are some of them."""
    open_remembered(tiny_model("llama"))
    model = tiny_model("llama")
    weight = model.lm_head.weight
    model.lm_head.weight = mx.where(mx.arange(weight.shape[0])[:, None] < 8, weight, mx.nan)
    with pytest.raises(InputError, match="not numbers"):
        open_remembered(model)
