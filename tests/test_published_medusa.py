"""Medusa heads in the published layout: what is read drafts as the published definition says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.beam_search import slow_beam_search
from oracles.medusa_heads import slow_head_logits
from oracles.sampling import softmax
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import DraftPlan, InputError, convert
from mlx_distill.drafters.imports import export_published, import_published
from mlx_distill.target.target import Target

Arrays = dict[str, mx.array]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer(bundled_pair: tuple[Any, Any]) -> Any:
    return bundled_pair[1]


def published(
    folder: Path,
    model: Any,
    heads: int = 2,
    layers: int = 1,
    prefix: str = "medusa_head.",
    spoil: Callable[[Arrays], Any] = len,
    **config: Any,
) -> Arrays:
    """Write random published heads; return their arrays."""
    target = Target.of(model)
    width = target.hidden_size
    mx.random.seed(3)
    arrays: Arrays = {}
    for head in range(heads):
        for layer in range(layers):
            block = f"{prefix}{head}.{layer}.linear"
            arrays[f"{block}.weight"] = 0.12 * mx.random.normal((width, width))
            arrays[f"{block}.bias"] = 0.12 * mx.random.normal((width,))
        rows = 0.3 * mx.random.normal((target.vocab_size, width))
        arrays[f"{prefix}{head}.{layers}.weight"] = rows
    spoil(arrays)
    values = {"medusa_num_heads": heads, "medusa_num_layers": layers}
    values |= {"base_model_name_or_path": "some/model"} | config
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    mx.save_safetensors(str(folder / "medusa_lm_head.safetensors"), arrays, {"format": "pt"})
    return arrays


def under_our_names(arrays: Arrays, layers: int, prefix: str) -> dict[str, np.ndarray]:
    found = {}
    for name, array in arrays.items():
        head, layer, *rest = name.removeprefix(prefix).split(".")
        ours = f"lm_head.{head}" if int(layer) == layers else f"blocks.{head}.{layer}.linear"
        found[f"{ours}.{rest[-1]}"] = np.array(array)
    return found


@pytest.mark.parametrize(
    ("heads", "layers", "prefix", "width"),
    [(1, 1, "medusa_head.", 2), (4, 2, "", 6), (5, 1, "medusa_head.", 9), (2, 0, "", 4)],
)
def test_what_is_read_drafts_as_published(
    tmp_path: Path, model: Any, tokenizer: Any, heads: int, layers: int, prefix: str, width: int
) -> None:
    """A published configuration may name fewer heads than there are."""
    arrays = published(tmp_path / "theirs", model, heads, layers, prefix, medusa_num_heads=1)
    import_published(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    drafter: Any = mlx_distill.load_drafter(tmp_path / "ours", model, tokenizer)
    assert drafter.config.num_heads == heads
    known = under_our_names(arrays, layers, prefix)
    size = drafter.config.hidden_size
    hidden = np.random.default_rng(width).normal(size=size).astype(np.float32)

    def log_probs(path: tuple[int, ...]) -> np.ndarray:
        return np.log(softmax(slow_head_logits(known, len(path), hidden)))

    draft = drafter.draft(mx.array(hidden), mx.array([7]), DraftPlan(width, heads))
    beams = [tuple(beam[1:]) for beam in draft.beams()]
    scores = sorted(np.array(draft.scores)[-width:], reverse=True)
    expected = slow_beam_search(log_probs, width, heads)[-1]
    assert dict(zip(beams, scores, strict=True)) == pytest.approx(expected, abs=1e-3)
    assert "Medusa heads for model, imported" in (tmp_path / "ours/README.md").read_text()


def test_what_is_written_is_read_again(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    arrays = published(tmp_path / "theirs", model, 3, prefix="")
    import_published(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    drafter: Any = mlx_distill.load_drafter(tmp_path / "ours", model, tokenizer)
    export_published(drafter, tmp_path / "back")
    back: Any = mx.load(str(tmp_path / "back" / "medusa_lm_head.safetensors"))
    assert back.keys() == {f"medusa_head.{name}" for name in arrays}
    assert all(mx.array_equal(back[f"medusa_head.{name}"], arrays[name]) for name in arrays)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {"medusa_num_heads": 3, "medusa_num_layers": 1}


SPOILT: list[tuple[Callable[[Arrays], Any], dict[str, Any], str]] = [
    (lambda x: x.pop("medusa_head.1.0.linear.bias"), {}, "blocks.1.0.linear.bias is missing"),
    (lambda x: x.update(gate=mx.ones(3)), {}, "gate is unknown"),
    (
        lambda x: x.update({"medusa_head.0.0.linear.bias": mx.ones(3)}),
        {},
        r"blocks.0.0.linear.bias is of shape \[3\], not \[64\]",
    ),
    (
        lambda x: x.update({"medusa_head.1.1.weight": x["medusa_head.1.1.weight"] + mx.nan}),
        {},
        "lm_head.1.weight holds values that are no finite numbers",
    ),
    (
        lambda x: x.update({"0.0.linear.bias": mx.ones(64)}),
        {},
        "once: 0.0.linear.bias, medusa_he",
    ),
    (lambda x: x.pop("medusa_head.0.1.weight"), {}, "the first head has no matrix"),
    (
        lambda x: x.update({"medusa_head.0.1.weight": mx.ones((97, 32))}),
        {},
        "made for another target: its hidden size is 32, this model's is 64",
    ),
    (
        lambda x: x.update({"medusa_head.0.1.weight": mx.ones((700, 64))}),
        {},
        "made for another target: its vocab size is 700",
    ),
    (lambda x: x.update({"900.0.linear.bias": mx.ones(64)}), {}, "number of heads must be between"),
    (len, {"medusa_num_heads": 3}, "blocks.2.0.linear.weight is missing"),
    (len, {"medusa_num_heads": "two"}, "medusa_num_heads must be a whole number, got 'two'"),
    (len, {"medusa_num_layers": 10**9}, "medusa_num_layers must be between 0 and 64"),
    (len, {"architectures": ["LlamaForCausalLMEagle3"]}, "is an EAGLE checkpoint, which is no sha"),
    (lambda x: x.update({"midlayer.mlp.bias": mx.ones(2)}), {}, "is an EAGLE checkpoint"),
]


@pytest.mark.parametrize(("spoil", "config", "sentence"), SPOILT)
def test_what_does_not_fit_is_named(
    tmp_path: Path, model: Any, tokenizer: Any, spoil: Any, config: dict[str, Any], sentence: str
) -> None:
    published(tmp_path / "theirs", model, spoil=spoil, **config)
    with pytest.raises(InputError, match=sentence):
        import_published(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    assert not (tmp_path / "ours").exists()


def test_what_is_pickled_is_never_read(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    published(tmp_path / "theirs", model)
    (tmp_path / "theirs" / "medusa_lm_head.safetensors").unlink()
    (tmp_path / "theirs" / "medusa_lm_head.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=r"medusa_lm_head.pt is pickled .*save_file"):
        import_published(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)


@pytest.mark.usefixtures("bundled_once")
def test_the_command_writes_both_layouts(
    tmp_path: Path, bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours, again = (str(tmp_path / name) for name in ("theirs", "ours", "again"))
    published(tmp_path / "theirs", bundled_pair[0])
    assert convert.main(["--drafter", theirs, "--output", ours, "--to", "ours"]) == 0
    assert convert.main(["--drafter", ours, "--output", again, "--to", "published"]) == 0
    assert "beam length" not in capsys.readouterr().out  # of recurrent drafters alone
    assert (tmp_path / "again/medusa_lm_head.safetensors").exists()
    config = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"taps": [1]}))
    assert convert.main(["--drafter", ours, "--output", again, "--head-rank", "3"]) == 2
