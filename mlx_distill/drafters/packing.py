"""Drafters with affine-quantised weights, in and out of folders.

They are as mlx-lm writes models: ``quantization`` in ``config.json``, and for a matrix ``x.weight``
of packed integers its ``x.scales`` and ``x.biases``. Packed they are on the disk only. A drafter is
loaded as floating-point numbers: its matrices are joined and tabulated for decoding anyway.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_distill.drafters.networks import SHAPES
from mlx_distill.drafters.shortlist import FILE as DIRECTIONS_FILE
from mlx_distill.errors import InputError
from mlx_distill.files import output_path, read_json, usable_path, whole_folder, write_whole
from mlx_distill.limits import plain
from mlx_distill.safetensors import check_safetensors, read_arrays
from mlx_distill.untyped import Fields

BITS = (4, 5, 6, 8)
GROUP_SIZE = 64
CARD = "README.md"
PARTS = "weight", "scales", "biases"


def quantize_drafter(folder: str | Path, output: str | Path, bits: int = 6) -> None:
    """Write a drafter's folder anew with quantised matrices, a third of the size with 6 bits.

    Args:
        folder: The drafter's folder; left as it is.
        output: The new one; must not exist. It gets all text files of the old one, too.
        bits: Of a weight: 4, 5, 6 or 8. Groups of 64 share a scale and an offset of 16 bits each.

    Raises:
        InputError: If there is no such drafter, it is quantised already, or nothing can be written.
    """
    source, bits = usable_path(folder, "the drafter"), plain(bits)
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    config, arrays = read_unquantised(source)
    config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits}
    note = f"Its matrices were quantised to {bits} bits in groups of {GROUP_SIZE}"
    write_changed(source, output_path(output), config, _packed(arrays, bits), note)


def read_unquantised(source: Path) -> tuple[Fields, dict[str, mx.array]]:
    """Return the configuration and the arrays of a trained drafter's folder.

    Raises:
        InputError: If it is none, or is quantised already.
    """
    if not (source / "config.json").exists():
        raise InputError(f"{source} holds no config.json, so it is not a drafter's folder")
    config = read_json(source / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SHAPES:
        raise InputError(f"{source} holds a {kind}, not a {' or a '.join(SHAPES)}")
    if "quantization" in config:
        raise InputError(f"{source} is quantised already")
    check_safetensors(source / "model.safetensors")
    return config, read_arrays(source / "model.safetensors")


def write_changed(
    source: Path, output: Path, config: Fields, arrays: dict[str, mx.array], note: str
) -> None:
    """Write a drafter's folder anew with other arrays of the same head, and all other files.

    Args:
        source: The drafter's folder.
        output: The new one; must not exist.
        config: Of the new one.
        arrays: Its weights.
        note: What was changed, for the card: what that says was found before.

    Raises:
        InputError: If the new folder exists, or cannot be written; nothing is left behind.
    """
    with whole_folder(output) as writing:
        for file in source.iterdir():
            text = file.suffix or file.name.isupper()  # as LICENSE is
            kept = (text and file.suffix != ".safetensors") or file.name == DIRECTIONS_FILE
            if file.is_file() and kept:
                shutil.copyfile(file, writing / file.name)
        card = writing / CARD
        if card.exists():
            text = card.read_text(encoding="utf-8", errors="replace").rstrip("\n")
            write_whole(card, f"{text}\n\n{note}; what stands above was measured before that.\n")
        write_whole(writing / "config.json", json.dumps(config, indent=2))
        mx.save_safetensors(str(writing / "model.safetensors"), arrays, {"format": "mlx"})


def unpacked(arrays: dict[str, mx.array], quantization: Fields) -> dict[str, mx.array]:
    """Return a drafter's arrays as floating-point numbers.

    Args:
        arrays: Those of its file.
        quantization: How they are packed: ``bits`` and ``group_size``.

    Raises:
        ValueError: If a matrix and its scales do not go together.
    """
    group_size, bits = quantization["group_size"], quantization["bits"]
    floats = dict(arrays)
    for name in arrays:
        if not name.endswith(".scales"):
            continue
        layer = name.removesuffix(".scales")
        try:
            weight, scales, biases = (floats.pop(f"{layer}.{part}") for part in PARTS)
        except KeyError:
            raise ValueError(f"{layer} lacks a part of a quantised matrix") from None
        found = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
        floats[f"{layer}.weight"] = found
    return floats


def _packed(arrays: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """Return arrays with all matrices quantised whose rows are whole groups."""
    packed: dict[str, mx.array] = {}
    for name, array in arrays.items():
        packed[name] = array
        if name.endswith(".weight") and array.ndim == 2 and array.shape[1] % GROUP_SIZE == 0:
            layer = name.removesuffix(".weight")
            parts = mx.quantize(array, group_size=GROUP_SIZE, bits=bits)
            packed |= dict(zip([name, f"{layer}.scales", f"{layer}.biases"], parts, strict=True))
    return packed
