"""Folders and files with something wrong, and what runs a command that has to refuse them."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny_models import tiny_config, tiny_model

from mlx_distill.checkpoint import bundled

TARGET = bundled("stories-14m")
Run = Callable[..., str]
Edit = Callable[[Path], Any]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs a command that has to refuse, and returns the sentence."""

    def run(main: Callable[[list[str]], int], *arguments: Any, alone: bool = True) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        lines = err.replace("\r", "\n").strip().splitlines()
        assert "Traceback" not in err
        assert lines[-1].startswith("error: "), err
        assert sum(line.startswith("error: ") for line in lines) == 1
        if alone:  # nothing was begun
            assert len(lines) == 1, err
            assert out == ""
        sentence = lines[-1].removeprefix("error: ")
        assert len(sentence) > 15
        assert not re.search(r"\b(Error|Exception|NoneType|KeyError)\b: ?$", sentence)
        return sentence

    return run


def changed(folder: Path, where: Path, **edits: Edit) -> Path:
    """Copy a model's or a drafter's folder and edit some files; ``__`` stands for a dot."""
    shutil.copytree(folder, where)
    for name, edit in edits.items():
        edit(where / name.replace("__", "."))
    return where


def delete(path: Path) -> None:
    path.unlink()


def write(content: str | bytes) -> Edit:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def set_fields(**fields: Any) -> Edit:
    """Return an edit of a JSON file; None takes a field away."""

    def edit(path: Path) -> None:
        values = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return edit


def cut(share: float) -> Edit:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit_header(edit: Callable[[bytes], bytes]) -> Edit:
    """Return an edit of a safetensors file's header that keeps the file consistent otherwise."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = edit(data[8 : 8 + length])
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return apply


def edit_arrays(edit: Callable[[dict[str, mx.array]], Any]) -> Edit:
    def apply(path: Path) -> None:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        edit(arrays)
        mx.eval(arrays)
        path.unlink()
        mx.save_safetensors(str(path), arrays, {"format": "mlx"})

    return apply


def save_tiny(name: str, where: Path) -> Path:
    """Write a tiny model of some architecture, with the bundled tokenizer."""
    where.mkdir()
    (where / "config.json").write_text(json.dumps(tiny_config(name)))
    weights: dict[str, Any] = dict(tree_flatten(tiny_model(name).parameters()))
    mx.save_safetensors(str(where / "model.safetensors"), weights, {"format": "mlx"})
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TARGET / file, where / file)
    return where
