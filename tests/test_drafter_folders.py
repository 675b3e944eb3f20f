"""Drafters out of folders: vocabularies that are padded, and numbers that do not belong there."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from half_models import REFERENCE
from huggingface_hub.utils import filter_repo_objects
from mlx.utils import tree_flatten

import mlx_distill
from mlx_distill import InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.fingerprint import check_fingerprint, fingerprint
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.target.target import Target

HASH = {"hidden_size": 8, "vocab_size": 100, "tokenizer_hash": "ab"}


def edited(
    source: Path,
    folder: Path,
    config: Callable[[dict[str, Any]], Any] | None = None,
    arrays: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """Return a copy of a folder whose configuration or arrays were changed in place."""
    shutil.copytree(source, folder)
    if config:
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    if arrays:
        weights = dict(mx.load(str(folder / "model.safetensors")))
        arrays(weights)
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return the bundled model with 64 rows more than its tokenizer has tokens."""

    def pad(weights: dict[str, Any]) -> None:
        name = "model.embed_tokens.weight"
        weights[name] = mx.pad(weights[name], [(0, 64), (0, 0)])

    folder = tmp_path_factory.mktemp("padded") / "model"
    widen = lambda values: values.update(vocab_size=4096 + 64)  # noqa: E731
    return mlx_distill.load(edited(bundled("stories-14m"), folder, widen, pad))


def test_a_drafter_of_the_hub_comes_with_all_of_its_files(
    monkeypatch: pytest.MonkeyPatch, bundled_pair: tuple[Any, Any]
) -> None:
    """mlx-lm fetches no file of weights whose name does not begin with model."""
    files = ["config.json", "model.safetensors", "shortlist.safetensors", "notes.pdf"]
    fetched: list[str] = []

    def fetch(name: str, **options: Any) -> str:
        kept = filter_repo_objects(files, allow_patterns=options["allow_patterns"])
        fetched.extend(str(one) for one in kept)
        return str(REFERENCE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    mlx_distill.load_drafter("somebody/some-drafter", *bundled_pair)
    assert fetched == files[:3]


def test_a_padded_head_is_no_other_target(padded: tuple[Any, Any]) -> None:
    drafter = mlx_distill.load_drafter(REFERENCE, *padded)
    for law in ({}, {"temperature": 1.0, "seed": 2}):
        options: dict[str, Any] = {"max_tokens": 16, **law}
        expected = mlx_distill.generate(*padded, "Once upon a time", **options)
        options["drafter"] = drafter
        found = list(mlx_distill.stream_generate(*padded, "Once upon a time", **options))
        assert found[-1].tokens_per_call > 1.2
        assert "".join(one.text for one in found) == expected


def test_without_a_tokenizer_another_width_is_another_target(padded: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="its vocab size is 4096, this model's is 4160"):
        mlx_distill.load_drafter(REFERENCE, padded[0])


def full_vocabulary(vocab_size: int) -> Any:
    """Return an edit that turns the bundled drafter into one without a map of its tokens."""

    def edit(weights: dict[str, Any]) -> None:
        ids = weights.pop("token_ids")
        head = next(name for name in weights if weights[name].shape[0] == ids.size)
        full = mx.zeros((vocab_size, weights[head].shape[1]), weights[head].dtype)
        full[ids] = weights[head]
        full[4096:] = 1  # what the target does not have looks likely
        weights[head] = full

    return edit


@pytest.mark.parametrize("size", [4096, 4160])
def test_a_drafter_of_a_padded_head_drafts_no_padding(
    bundled_pair: tuple[Any, Any], tmp_path: Path, size: int
) -> None:

    def configure(values: dict[str, Any]) -> None:
        values.pop("draft_vocab_size")
        values["vocab_size"] = values["target"]["vocab_size"] = size

    source = REFERENCE
    folder = edited(source, tmp_path / "drafter", configure, full_vocabulary(size))
    drafter = mlx_distill.load_drafter(folder, *bundled_pair)
    assert drafter.config.vocab_size == 4096
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 1}
    expected = mlx_distill.generate(*bundled_pair, "Once upon a time", **options)
    assert (
        mlx_distill.generate(*bundled_pair, "Once upon a time", drafter=drafter, **options)
        == expected
    )


def test_a_drafter_of_a_wider_model_is_not_used_for_another(
    bundled_pair: tuple[Any, Any], padded: tuple[Any, Any]
) -> None:
    drafter = mlx_distill.load_drafter(REFERENCE, *bundled_pair)
    assert mlx_distill.generate(*padded, "Once", drafter=drafter, max_tokens=2)
    drafter.network.config = dataclasses.replace(drafter.config, vocab_size=4160)
    with pytest.raises(InputError, match="loaded for a model of 4160 tokens, this one has 4096"):
        mlx_distill.stream_generate(*bundled_pair, "Once", drafter=drafter)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (HASH, HASH),
        (HASH, {**HASH, "vocab_size": 128}),
        ({**HASH, "vocab_size": 199}, HASH),
        ({**HASH, "vocab_size": 100}, {"hidden_size": 8, "vocab_size": 100}),
    ],
)
def test_targets_that_fit(known: dict[str, Any], found: dict[str, Any]) -> None:
    check_fingerprint(known, found)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vocab_size": 10**9}, "vocab size"),
        ({"vocab_size": 201}, "vocab size"),
        ({"vocab_size": "100"}, "vocab size"),
        ({"vocab_size": None}, "vocab size"),
        ({"hidden_size": 16}, "hidden size"),
        ({"tokenizer_hash": "cd"}, "tokenizer hash"),
        ({"tokenizer_hash": None}, "tokenizer hash"),
    ],
)
def test_targets_that_do_not_fit(change: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"made for another target: its {name} is"):
        check_fingerprint({**HASH, **change}, HASH)


@pytest.mark.parametrize(
    ("fields", "target", "sentence"),
    [
        ({"vocab_size": 10**9}, {}, "vocab_size is 1000000000, that of its target 4096"),
        (
            {"vocab_size": 10**9},
            {"vocab_size": 10**9},
            "its vocab size is 1000000000, this model's is 4096",
        ),
        ({"exit_dim": 10**9}, {}, "exit_dim is 1000000000, which no array there has"),
        ({"num_draft_layers": 10**9}, {}, "num_draft_layers is 1000000000, which no array"),
        ({"embedding_size": 10**9}, {}, "embedding_size is 1000000000, which no array"),
    ],
)
def test_numbers_beyond_the_file_are_refused_before_anything_is_built(
    bundled_pair: tuple[Any, Any],
    tmp_path: Path,
    fields: dict[str, int],
    target: dict[str, int],
    sentence: str,
) -> None:

    def change(values: dict[str, Any]) -> None:
        values.update(fields)
        values["target"].update(target)

    folder = edited(REFERENCE, tmp_path / "drafter", change)
    with pytest.raises(InputError, match=sentence):
        mlx_distill.load_drafter(folder, *bundled_pair)


def test_a_map_beyond_the_real_vocabulary_is_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """Though its own configuration and its fingerprint speak of more tokens."""

    def change(values: dict[str, Any]) -> None:
        values["vocab_size"] = values["target"]["vocab_size"] = 8000

    def move(weights: dict[str, Any]) -> None:
        weights["token_ids"] = weights["token_ids"] + 3000

    folder = edited(REFERENCE, tmp_path / "drafter", change, move)
    with pytest.raises(InputError, match="token_ids must lie in the vocabulary of 4096"):
        mlx_distill.load_drafter(folder, *bundled_pair)


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_weights_that_are_no_numbers_are_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path, value: float
) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights["rnn_u.bias"] = mx.full(weights["rnn_u.bias"].shape, value, mx.float16)

    folder = edited(REFERENCE, tmp_path / "drafter", arrays=spoil)
    with pytest.raises(InputError, match=r"rnn_u\.bias holds values that are no finite numbers"):
        mlx_distill.load_drafter(folder, *bundled_pair)


@pytest.mark.parametrize("kind", [mx.int32, mx.uint8, mx.bool_, mx.complex64])
def test_weights_that_are_no_floats_are_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path, kind: mx.Dtype
) -> None:
    """Complex ones ended the first draft in a traceback; of whole ones only the zeros were left."""

    def spoil(weights: dict[str, Any]) -> None:
        weights["rnn_w.weight"] = weights["rnn_w.weight"].astype(kind)

    folder = edited(REFERENCE, tmp_path / "drafter", arrays=spoil)
    name = str(kind).removeprefix("mlx.core.")
    with pytest.raises(InputError, match=rf"rnn_w\.weight is {name}; weights .* are floats"):
        mlx_distill.load_drafter(folder, *bundled_pair)


@pytest.mark.parametrize("kind", [mx.int32, mx.complex64])
def test_directions_of_a_shortlist_that_are_no_floats_are_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path, kind: mx.Dtype
) -> None:
    folder = edited(REFERENCE, tmp_path / "drafter")
    arrays = {name: mx.ones((256, 8)).astype(kind) for name in ("into", "back")}
    mx.save_safetensors(str(folder / "shortlist.safetensors"), arrays)
    with pytest.raises(InputError, match=r"shortlist\.safetensors: .* are floats"):
        mlx_distill.load_drafter(folder, *bundled_pair)


def test_arrays_of_a_type_that_mlx_does_not_have_are_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path
) -> None:
    folder = edited(REFERENCE, tmp_path / "drafter")
    arrays = {name: np.ones((256, 8)) for name in ("into", "back")}
    safetensors.numpy.save_file(arrays, folder / "shortlist.safetensors")
    with pytest.raises(InputError, match=r"shortlist\.safetensors cannot be read: .* F64"):
        mlx_distill.load_drafter(folder, *bundled_pair)
    (folder / "shortlist.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: .* F64"):
        mlx_distill.quantize_drafter(folder, tmp_path / "small")


@pytest.fixture
def wide(bundled_pair: tuple[Any, Any], tmp_path: Path) -> Path:
    """Return a folder of a drafter with every kind of layer; some rows are no whole groups."""
    shape = {"exit_dim": 96, "num_draft_layers": 1, "draft_vocab_size": 512, "cell": "gru"}
    blocks = {"context_blocks": 1, "context_window": 8, "context_heads": 2}
    more = {"context_state": True, "taps": (1, -1), **blocks}
    config = RecurrentDrafterConfig(384, 4096, **shape, **more)
    target = fingerprint(Target.of(bundled_pair[0]), bundled_pair[1])
    save_drafter(tmp_path / "wide", RecurrentDrafter(config), target, {"README.md": "# wide"})
    return tmp_path / "wide"


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_quantised_drafter_is_nearly_the_same_in_less_space(
    bundled_pair: tuple[Any, Any], tmp_path: Path, wide: Path, bits: int
) -> None:
    mlx_distill.quantize_drafter(wide, tmp_path / "small", bits)
    drafter = mlx_distill.load_drafter(tmp_path / "small", *bundled_pair)
    whole = mlx_distill.load_drafter(wide, *bundled_pair)
    assert drafter.config == whole.config
    values = dict(tree_flatten(whole.network.parameters()))
    for name, array in tree_flatten(drafter.network.parameters()):
        step = (values[name].max() - values[name].min()).item() / (2**bits - 1)
        assert mx.abs(array - values[name]).max().item() <= step
    before, after = (
        (folder / "model.safetensors").stat().st_size for folder in (wide, tmp_path / "small")
    )
    assert after < before * (bits + 3) / 32
    card = (tmp_path / "small/README.md").read_text()
    said = f"Its matrices were quantised to {bits} bits in groups of 64"
    assert card == f"# wide\n\n{said}; what stands above was measured before that.\n"
    expected = mlx_distill.generate(*bundled_pair, "Once upon a time", max_tokens=6)
    options: dict[str, Any] = {"drafter": drafter, "max_tokens": 6}
    assert mlx_distill.generate(*bundled_pair, "Once upon a time", **options) == expected


def test_the_licence_goes_with_a_quantised_drafter(tmp_path: Path, wide: Path) -> None:
    (wide / "LICENSE").write_text("of its own")
    (wide / ".hidden").touch()
    mlx_distill.quantize_drafter(wide, tmp_path / "small")
    names = {file.name for file in (tmp_path / "small").iterdir()}
    assert names == {"LICENSE", "README.md", "config.json", "model.safetensors"}


def test_n_grams_and_a_drafter_of_no_name(bundled_pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="the drafter beside n-grams has an empty name"):
        mlx_distill.load_drafter("ngram+", *bundled_pair)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 7, "group_size": 64},
        {"bits": 4, "group_size": 5},
        {"bits": 4.0, "group_size": 64},
        {"bits": 4, "group_size": 64.0},
        {"bits": 4},
        4,
    ],
)
def test_a_quantisation_that_there_is_not_is_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path, wide: Path, quantization: Any
) -> None:
    mlx_distill.quantize_drafter(wide, tmp_path / "small", 4)
    change = lambda values: values.update(quantization=quantization)  # noqa: E731
    folder = edited(tmp_path / "small", tmp_path / "edited", change)
    with pytest.raises(InputError, match="a quantization has"):
        mlx_distill.load_drafter(folder, *bundled_pair)


@pytest.mark.parametrize("name", ["rnn_u.biases", "rnn_u.weight", "rnn_u.scales"])
@pytest.mark.parametrize("rows", [0, 7])
def test_a_quantised_matrix_that_lacks_a_part_is_refused(
    bundled_pair: tuple[Any, Any], tmp_path: Path, wide: Path, name: str, rows: int
) -> None:

    def cut(weights: dict[str, Any]) -> None:
        weights[name] = weights[name][:rows]
        if not rows:
            del weights[name]

    mlx_distill.quantize_drafter(wide, tmp_path / "small", 4)
    folder = edited(tmp_path / "small", tmp_path / "edited", arrays=cut)
    with pytest.raises(InputError, match="does not fit its config"):
        mlx_distill.load_drafter(folder, *bundled_pair)


def test_what_cannot_be_quantised_is_refused(tmp_path: Path, wide: Path) -> None:
    for bits in (0, 3, 7, True):
        with pytest.raises(InputError, match="bits must be one of 4, 5, 6, 8, got"):
            mlx_distill.quantize_drafter(wide, tmp_path / "small", bits)
    with pytest.raises(InputError, match="holds a llama, not a recurrent_drafter"):
        mlx_distill.quantize_drafter(bundled("stories-14m"), tmp_path / "small")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        mlx_distill.quantize_drafter(tmp_path, tmp_path / "small")
    listed = edited(wide, tmp_path / "listed", lambda config: config.update(model_type=["medusa"]))
    with pytest.raises(InputError, match=r"holds a \['medusa'\], not a recurrent_drafter"):
        mlx_distill.quantize_drafter(listed, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    mlx_distill.quantize_drafter(wide, tmp_path / "small")
    with pytest.raises(InputError, match="is quantised already"):
        mlx_distill.quantize_drafter(tmp_path / "small", tmp_path / "smaller")
    with pytest.raises(InputError):
        mlx_distill.quantize_drafter(wide, tmp_path / "small")
