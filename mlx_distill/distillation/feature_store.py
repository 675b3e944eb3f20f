"""What a target computes of its answers, on disk: read in every epoch, computed in the first.

A folder holds a file per group of answers, in two bytes a number, and a manifest that says whose
features they are. A file appears when it is whole, so a training that was stopped, or another one
of the same answers, computes only what is missing.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.texts import Text
from mlx_distill.distillation.drafter import TargetView
from mlx_distill.distillation.target_reader import TargetReader
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_json, write_arrays, write_whole
from mlx_distill.safetensors import read_arrays, read_header

FORMAT_VERSION = 1
MANIFEST = "features.json"
PLACES, STATES = ("I32",), ("BF16", "F16")  # types of tokens and counts, and of all else
PLACE_BYTES = 8  # of a token's id, and of how many follow it


class FeatureStore:
    """Features of groups of answers.

    Args:
        folder: Where they are kept; made when the first are.
        reader: Computes what is missing.
        groups: The answers of every group.
        target: What the target is known by, its weights included.

    Raises:
        InputError: If the folder holds others, or cannot be read, or a file of it is damaged, or
            the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        reader: TargetReader,
        groups: Sequence[Sequence[Text]],
        target: Mapping[str, int | str],
    ):
        self._folder = folder
        self._reader = reader
        self._groups = groups
        self._type = reader.embed(mx.array([0])).dtype
        self._manifest = {
            "format_version": FORMAT_VERSION,
            "target": dict(target),
            "taps": list(reader.taps),
            "groups": [_hash(texts) for texts in groups],
        }
        if reader.look_back:
            self._manifest["look_back"] = reader.look_back
        self._check()
        missing = []
        for number, texts in enumerate(groups):
            if self._path(number).exists():
                self._read(number)  # damage is told before anything is trained
            else:
                missing.append(texts)
        self.num_missing = sum(reader.num_rows(text) for texts in missing for text in texts)
        check_disk(folder, self.num_missing * stored_row_bytes(reader))

    def view(self, number: int) -> TargetView:
        """Return the features of a group, as they are kept."""
        path = self._path(number)
        if not path.exists():
            self._write(path, self._reader.view(self._groups[number]))
        arrays = self._read(number)
        hidden = arrays["hidden"].astype(self._type)
        goals = arrays["goals"].astype(self._type) if "goals" in arrays else hidden
        taps = tuple(arrays[name].astype(self._type) for name in _tap_names(self._reader))
        mx.eval(hidden, goals, taps)
        tokens, ahead = arrays["tokens"], arrays["ahead"]
        return TargetView(hidden, tokens, ahead, goals, self._reader.embed, taps)

    def _read(self, number: int) -> dict[str, mx.array]:
        """Return the arrays of a group's file; those that are large are not loaded yet.

        Raises:
            InputError: If they are not what a view of the group's answers is made of: an index
                that is out of bounds would be read all the same.
        """
        path = self._path(number)
        tokens, ahead = self._reader.rows(self._groups[number])
        header = read_header(path)
        wanted = self._columns()
        for name in sorted(wanted.keys() ^ header.keys()):
            raise _damaged(path, f"it {'lacks' if name in wanted else 'also holds'} {name}")
        for name, width in wanted.items():
            types = PLACES if width is None else STATES
            found, shape = header[name], tokens.shape if width is None else (tokens.size, width)
            if found.shape != shape or found.dtype not in types:
                raise _damaged(
                    path,
                    f"its array {name} is {found.dtype} of shape {list(found.shape)}, not "
                    f"{' or '.join(types)} of shape {list(shape)}",
                )
        arrays = read_arrays(path)
        for name, known in (("tokens", tokens), ("ahead", ahead)):
            if not np.array_equal(np.array(arrays[name]), known):
                raise _damaged(path, f"its array {name} is not that of the answers")
        return arrays

    def _columns(self) -> dict[str, int | None]:
        """Return the arrays of a file by name, and how wide each is; None for one without width."""
        target = self._reader.target
        columns: dict[str, int | None] = {"tokens": None, "ahead": None}
        columns |= dict.fromkeys(("hidden", *_tap_names(self._reader)), target.hidden_size)
        return columns if self._reader.answers.body else columns | {"goals": target.vocab_size}

    def _write(self, path: Path, view: TargetView) -> None:
        arrays = {"hidden": short(view.hidden), "tokens": view.tokens, "ahead": view.ahead}
        if view.goals is not view.hidden:
            arrays["goals"] = short(view.goals)
        arrays |= dict(zip(_tap_names(self._reader), map(short, view.taps), strict=True))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / MANIFEST).exists():
                write_whole(self._folder / MANIFEST, json.dumps(self._manifest))
        except OSError as error:
            raise InputError(f"{path} could not be written: {one_line(error)}") from None
        write_arrays(path, arrays)

    def _check(self) -> None:
        """Raise InputError if the folder holds anything but these features."""
        if not self._folder.exists():
            return
        if not self._folder.is_dir():
            raise InputError(f"{self._folder} is no folder; name another for the features")
        path = self._folder / MANIFEST
        if not path.exists():
            if any(self._folder.iterdir()):
                raise InputError(f"{self._folder} holds no features, but something else")
            return
        found = read_json(path)
        for name, of in (
            ("target", "another model, or of other weights"),
            ("taps", "other layers"),
        ):
            if found.get(name) != self._manifest[name]:
                raise InputError(
                    f"{self._folder} holds features of {of}; remove it or name another folder"
                )
        if found != self._manifest:
            raise InputError(
                f"{self._folder} holds features of other answers, or of the same ones grouped "
                "otherwise (--seed, --held-out, --feature-gb); remove it or name another folder"
            )

    def _path(self, number: int) -> Path:
        return self._folder / f"group-{number:05d}.safetensors"


def stored_row_bytes(reader: TargetReader) -> int:
    """Return what a token of an answer takes on disk."""
    itemsize = reader.embed(mx.array([0])).dtype.size
    return reader.row_bytes * min(2, itemsize) // itemsize + PLACE_BYTES


def check_disk(folder: Path, needed: int) -> None:
    """Raise InputError if so many bytes do not fit on the disk of a folder that may not exist."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the features need {needed / 1e9:.2f} GB and the disk of {folder} has "
            f"{free / 1e9:.2f} GB left; without --features they are computed in every epoch"
        )


def short(array: mx.array) -> mx.array:
    """Return an array as it is kept, in two bytes a number."""
    return array.astype(mx.bfloat16) if array.dtype == mx.float32 else array


def _tap_names(reader: TargetReader) -> list[str]:
    return [f"tap-{layer}" for layer in reader.taps]


def _damaged(path: Path, how: str) -> InputError:
    return InputError(f"{path} is damaged: {how}; remove it, and it is computed anew")


def _hash(texts: Sequence[Text]) -> str:
    content: list[Any] = [[list(text.tokens), text.num_learned] for text in texts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
