"""Drafters in the published layout: what is read drafts as the published definition says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from half_models import REFERENCE
from mlx.utils import tree_flatten
from oracles.beam_search import slow_beam_search
from oracles.recurrent_drafter import slow_logits
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import DraftPlan, InputError, convert
from mlx_distill.drafters.published import (
    export_drafter,
    import_drafter,
    our_names,
    tensorrt_plan,
)
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.target.target import Target

Arrays = dict[str, mx.array]
WRONG = mx.full((64, 64), mx.nan)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def in_old_layout(name: str, layout: str, has_projection: bool) -> str:
    """Return the name that an array of ours has in a published layout."""
    head = name.removeprefix("lm_head.")
    if layout == "current" or name.startswith("rnn_"):
        return name
    if layout == "mlx":
        return name if head == name else f"lm_head.layers.{head}"
    if layout == "lists":
        return name.replace("input_proj", "input_projs.0") if head == name else f"lm_heads.0.{head}"
    if layout == "plural":
        return name.replace("input_proj", "input_projs") if head == name else f"lm_heads.{head}"
    if head == name:
        return name.replace("input_proj", "0.0")
    place, _, rest = head.partition(".")
    return f"0.{int(place) + has_projection}.{rest}"


def published(
    folder: Path,
    model: Any,
    layout: str = "current",
    rnn: bool = True,
    exit_dim: int | None = None,
    spoil: Callable[[Arrays], Any] = len,
    change: dict[str, Any] | None = None,
) -> Arrays:
    """Write a random published drafter; return its arrays under our names."""
    target = Target.of(model)
    width = target.hidden_size
    shape = (width, target.vocab_size, exit_dim or width, 2, rnn)
    mx.random.seed(3)
    network = RecurrentDrafter(RecurrentDrafterConfig(*shape))
    arrays: Any = dict(tree_flatten(network.parameters()))
    arrays = {name: 0.12 * mx.random.normal(x.shape) for name, x in arrays.items()}
    known = "input_proj.weight" in arrays
    written = {in_old_layout(name, layout, known): x for name, x in arrays.items()}
    written["emb_norm.weight"] = mx.ones(width)
    spoil(written)
    names = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn")
    config = {"model_type": "recurrent_drafting_drafter", "emb_norm": True}
    config |= dict(zip(names, shape, strict=True)) | (change or {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), written, {"format": "pt"})
    return arrays


@pytest.fixture(scope="module")
def tokenizer(bundled_pair: tuple[Any, Any]) -> Any:
    return bundled_pair[1]


@pytest.mark.parametrize(
    ("layout", "rnn", "width", "beam_length"),
    [
        ("current", True, 2, 2),
        ("mlx", False, 6, 8),
        ("lists", True, 9, 14),
        ("plural", False, 2, 2),
        ("sequence", True, 6, 8),
        ("current", False, 9, 14),
    ],
)
@pytest.mark.parametrize("projected", [True, False])
def test_what_is_read_drafts_as_published(
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    layout: str,
    rnn: bool,
    width: int,
    beam_length: int,
    projected: bool,
) -> None:
    """A published beam begins with the certain token: it drafts one less than its length."""
    size = Target.of(model).hidden_size
    exit_dim = None if projected else 2 * size
    arrays = published(tmp_path / "theirs", model, layout, rnn, exit_dim)
    import_drafter(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    drafter: Any = mlx_distill.load_drafter(tmp_path / "ours", model, tokenizer)
    embed = np.array(Target.of(model).embed(mx.arange(97)))
    hidden = np.random.default_rng(width).normal(size=size).astype(np.float32)

    def log_probs(path: tuple[int, ...]) -> np.ndarray:
        logits = slow_logits(arrays, hidden, embed[[7, *path]], rnn)
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    plan = DraftPlan(width, beam_length - 1)
    draft = drafter.draft(mx.array(hidden), mx.array([7]), plan)
    beams = [tuple(beam[1:]) for beam in draft.beams()]
    scores = sorted(np.array(draft.scores)[-width:], reverse=True)  # as the beams are
    expected = slow_beam_search(log_probs, width, beam_length - 1)[-1]
    assert dict(zip(beams, scores, strict=True)) == pytest.approx(expected, abs=1e-3)


def test_what_is_written_is_read_again(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    arrays = published(tmp_path / "theirs", model)
    import_drafter(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    drafter: Any = mlx_distill.load_drafter(tmp_path / "ours", model, tokenizer)
    export_drafter(drafter, tmp_path / "back")
    back: Any = mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert back.keys() == arrays.keys()
    assert all(mx.array_equal(back[name], arrays[name]) for name in arrays)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "recurrent_drafting_drafter"
    assert config["num_draft_layers"] == 2
    import_drafter(tmp_path / "back", tmp_path / "again", Target.of(model), tokenizer)


def test_a_sequence_without_a_projection_begins_with_its_blocks() -> None:
    names = our_names({"0.0.linear.bias": (4,), "0.1.weight": (9, 4), "emb_norm.weight": (4,)})
    assert list(names.values()) == ["lm_head.0.linear.bias", "lm_head.1.weight", ""]


def test_what_the_published_form_lacks_is_not_exported(
    tmp_path: Path, bundled_pair: tuple[Any, Any]
) -> None:
    drafter: Any = mlx_distill.load_drafter(REFERENCE, *bundled_pair)
    drafter.network.config = RecurrentDrafterConfig(
        **{**vars(drafter.config), "draft_vocab_size": 99, "taps": (1,)}
    )
    with pytest.raises(InputError, match=r"the published form knows no draft_vocab_size, .*taps"):
        export_drafter(drafter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensorrts_lengths_do_not_count_the_certain_token(tmp_path: Path, model: Any) -> None:
    settings = {"redrafter_num_beams": 5, "redrafter_draft_len_per_beam": 4}
    published(tmp_path / "a", model, change=settings)
    assert tensorrt_plan(tmp_path / "a") == DraftPlan(5, 4, tree="beam")
    published(tmp_path / "b", model)
    assert tensorrt_plan(tmp_path / "b") is None


@pytest.mark.parametrize(
    ("spoil", "others", "sentence"),
    [
        (lambda x: x.pop("rnn_u.bias"), {}, "rnn_u.bias is missing"),
        (lambda x: x.update(gate=mx.ones(3)), {}, "gate is unknown"),
        (
            lambda x: x.update({"rnn_w.weight": mx.ones((2, 3)), "more": mx.ones(1)}),
            {},
            r"more is unknown, rnn_w.weight is of shape \[2, 3\], not \[64, 64\]",
        ),
        (
            lambda x: x.update({"rnn_u.bias": mx.full(64, float("nan"))}),
            {},
            "rnn_u.bias holds values that are no finite numbers",
        ),
        (len, {"hidden_size": 32}, "made for another target: its hidden size is 32"),
        (len, {"exit_dim": -1}, "exit_dim must be at least 1, got -1"),
        (len, {"num_draft_layers": 10**6}, "num_draft_layers must be between 0 and 1,000"),
        (len, {"rnn": "yes"}, "rnn must be"),
        (lambda x: x.update({"input_projs.0.bias": mx.ones(64)}), {}, "array more than once: in"),
        (
            lambda x: x.update({"rnn_u.bias": mx.full(64, mx.inf), "rnn_w.weight": WRONG}),
            {},
            "rnn_u.bias, rnn_w.weight holds values that are no finite numbers",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    spoil: Callable[[Arrays], Any],
    others: dict[str, Any],
    sentence: str,
) -> None:
    published(tmp_path / "theirs", model, spoil=spoil, change=others)
    with pytest.raises(InputError, match=sentence):
        import_drafter(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)
    assert not (tmp_path / "ours").exists()


def test_what_is_pickled_is_never_read(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    published(tmp_path / "theirs", model)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=r"pytorch_model.bin is pickled .*save_file"):
        import_drafter(tmp_path / "theirs", tmp_path / "ours", Target.of(model), tokenizer)


def test_the_command_writes_both_layouts(
    tmp_path: Path, bundled_pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours, again = (str(tmp_path / name) for name in ("theirs", "ours", "again"))
    settings = {"redrafter_num_beams": 5, "redrafter_draft_len_per_beam": 3}
    arrays = published(tmp_path / "theirs", bundled_pair[0], "lists", change=settings)
    assert convert.main(["--drafter", theirs, "--output", ours, "--to", "ours"]) == 0
    assert "its beams of 5 x 3 drafted tokens" in capsys.readouterr().out
    assert convert.main(["--drafter", ours, "--output", again, "--to", "published"]) == 0
    assert "--draft-length 4 here, a beam length of 5" in capsys.readouterr().out
    written = mx.load(str(tmp_path / "again" / "model.safetensors"))
    assert isinstance(written, dict)
    assert written.keys() == arrays.keys()
    for flags in (["--to", "published"], []):  # it exists; smaller needs answers
        assert convert.main(["--drafter", ours, "--output", again, *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1
