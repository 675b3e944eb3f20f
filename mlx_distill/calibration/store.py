"""Where calibrations are kept: one JSON file per machine, MLX version, target and drafter.

What cannot be read is measured again, and what cannot be kept is used all the same: either costs
one line on stderr, never a run.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import machine
from mlx_distill.calibration.measuring import Calibration, summary
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.timing import LOADED
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import cache_folder, read_json, write_whole
from mlx_distill.speculation.costs import Costs

FORMAT = 5
# What changes how fast a processor works through the same operations.
ENVIRONMENT = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MLX_ENABLE_TF32")


def identity(pair: Pair) -> dict[str, Any]:
    """Return what a calibration holds for, and for nothing else."""
    drafter = getattr(pair.drafter, "config", None)
    return {
        "format": FORMAT,
        "machine": machine.description(),
        "mlx": machine.versions()["mlx"],
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "target": fingerprint(pair.target, pair.tokenizer) | _precision(pair.model),
        "drafter": f"{type(pair.drafter).__name__} {drafter or ''}".strip(),
        "cache": {"kv_bits": pair.cache.kv_bits, "max_kv_size": pair.cache.max_kv_size},
        **({"exact_rows": True} if pair.exact_rows else {}),
    }


def _precision(model: nn.Module) -> dict[str, Any]:
    """Return how large a model is and in which types its weights are."""
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    arrays = named.values()
    return {
        "model_type": str(getattr(model, "model_type", type(model).__name__)),
        "bytes": sum(array.nbytes for array in arrays),
        "types": sorted({str(array.dtype) for array in arrays}),
    }


def file_of(known: Mapping[str, Any]) -> Path:
    """Return the file of a calibration."""
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("calibration") / f"{known['target']['model_type']}-{digest}.json"


def find(known: Mapping[str, Any]) -> Costs | None:
    """Return the costs that are kept, or None; a file that cannot be used is named on stderr."""
    file = file_of(known)
    try:
        if not file.exists():
            return None
        values = read_json(file)
        if values.get("identity") != json.loads(json.dumps(known)):
            raise InputError("it was measured elsewhere")
        costs = values.get("costs")
        if not isinstance(costs, dict):
            raise InputError("it holds no costs")
        return Costs.from_dict(costs)
    except (InputError, OSError) as error:
        _say(f"the calibration {file} is ignored and measured again: {one_line(error)}")
        return None


def keep(known: Mapping[str, Any], calibration: Calibration) -> bool:
    """Keep a calibration for the next run, and return whether it was.

    What was measured beside other programs is not kept.
    """
    spread = calibration.costs.spread
    if spread > LOADED:
        _say(
            f"the machine is busy: times of the same work differ by {spread:.0%}, so what was "
            "measured is used with caution and not kept"
        )
        return False
    file = file_of(known)
    values = {
        "identity": known,
        "costs": calibration.costs.to_dict(),
        "times": summary(calibration),
        "versions": machine.versions(),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        _say(f"the calibration cannot be kept in {file.parent}: {error.strerror or error}")
        return False
    return True


def _say(sentence: str) -> None:
    print(f"mlx_distill: {sentence}", file=sys.stderr)
