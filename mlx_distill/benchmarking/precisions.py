"""One model in several precisions, converted by mlx-lm, each once."""

import os
import shutil
from pathlib import Path
from typing import Any

import mlx_lm

from mlx_distill.checkpoint import load, local_folder
from mlx_distill.errors import InputError, one_line
from mlx_distill.names import shown

AS_IT_IS = "as-is"
_TYPE = {"dtype": "float16"}  # M1 and M2 emulate bfloat16
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp16": _TYPE,
    "8-bit": {**_TYPE, "quantize": True, "q_bits": 8},
    "4-bit": {**_TYPE, "quantize": True, "q_bits": 4},
    "mxfp8": {**_TYPE, "quantize": True, "q_mode": "mxfp8"},
    "mxfp4": {**_TYPE, "quantize": True, "q_mode": "mxfp4"},
    AS_IT_IS: {},
}


def in_precision(model: str, precision: str, folder: Path) -> Path:
    """Return the folder of a model in a precision; it is converted if it is not there yet.

    Args:
        model: A folder or a hub repository.
        precision: One of ``PRECISIONS``.
        folder: Keeps the converted models; a kill leaves none that is half written.

    Raises:
        InputError: If the model cannot be read or converted, as one that is quantised already.
    """
    if precision == AS_IT_IS:
        return Path(model)
    converted = folder / f"{shown(model)}-{precision}"
    if converted.exists():
        return converted
    writing = converted.with_name(converted.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = local_folder(model)
    network, _ = load(source, lazy=True)
    if any("scales" in module for module in network.modules()):
        raise InputError(
            f"{model} is quantised already; start from its full weights, or use {AS_IT_IS}"
        )
    del network
    try:
        mlx_lm.convert(str(source), str(writing), **PRECISIONS[precision])
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{model} cannot be converted to {precision}: {one_line(error)}") from None
    os.replace(writing, converted)
    return converted
