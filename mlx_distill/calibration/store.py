"""Where calibrations are kept: one JSON file per machine, MLX version, target and drafter.

What cannot be read is measured again, and what cannot be kept is used all the same: either costs
one line on stderr, never a run. Of what was measured beside other programs nothing is kept.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import machine
from mlx_distill.blas import openblas
from mlx_distill.calibration.measuring import Calibration, summary
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.timing import LOADED
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_json, write_whole
from mlx_distill.hashes import weights_hash
from mlx_distill.kernels.choice import VARIABLE
from mlx_distill.kernels.exponentials import by_powers
from mlx_distill.kernels.probe import Verdict
from mlx_distill.limits import check_value, hints
from mlx_distill.speculation.costs import Costs
from mlx_distill.user_cache import cache_folder

FORMAT = 9
# The spread of what turned out to be wrong, and how often it may: measuring takes 20 seconds.
DOUBTED, MOST_DOUBTS = 2 * LOADED, 3
Made = TypeVar("Made")
# What changes how fast a processor works through the same operations.
ENVIRONMENT = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MLX_ENABLE_TF32", VARIABLE)


def identity(pair: Pair) -> dict[str, Any]:
    """Return what a calibration holds for, and for nothing else."""
    drafter, network = getattr(pair.drafter, "config", None), _network(pair.drafter)
    return {
        "format": FORMAT,
        "machine": machine.description(),
        "mlx": machine.versions()["mlx"],
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "target": fingerprint(pair.target, pair.tokenizer) | _precision(pair.model),
        "drafter": f"{type(pair.drafter).__name__} {drafter or ''}".strip(),
        "drafter_weights": {} if network is None else _precision(network),
        "cache": {"kv_bits": pair.cache.kv_bits, "max_kv_size": pair.cache.max_kv_size},
        **({"row_products": openblas.most_rows()} if openblas.most_rows() else {}),
        **({"powers": True} if by_powers() else {}),
        **({"exact_rows": True} if pair.exact_rows else {}),
    }


def drafter_hash(drafter: Drafter) -> str:
    """Return what tells a drafter's weights from others of its shape; empty if it has none."""
    network = _network(drafter)
    return "" if network is None else weights_hash(network)


def _network(drafter: Drafter) -> nn.Module | None:
    """Return what of a drafter, or of the one in a mixture, has weights."""
    own = getattr(drafter, "drafter", drafter)
    network = getattr(own, "network", getattr(own, "model", None))
    return network if isinstance(network, nn.Module) else None


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


def find(known: Mapping[str, Any], weights: str = "") -> Costs | None:
    """Return the costs that are kept, or None; a file that cannot be used is named on stderr.

    What a cycle takes does not depend on the drafter's weights, what it brings does.

    Args:
        known: What the costs have to hold for.
        weights: The drafter's, see ``drafter_hash``; what others brought is not taken over.
    """

    def made(values: Any) -> Costs:
        costs = values.get("costs")
        if not isinstance(costs, dict):
            raise InputError("it holds no costs")
        found = Costs.from_dict(costs)
        if values.get("drafter_weights") != weights:
            return replace(found, cycle_tokens=0.0, sampled_cycle_tokens=0.0)
        return found

    return recall(known, "calibration", made)


def is_loaded(costs: Costs) -> bool:
    """Return whether costs were measured beside other programs, or turned out to have been."""
    return costs.spread > LOADED


def find_kernels(known: Mapping[str, Any]) -> list[Verdict]:
    """Return what was found of the kernels with a calibration; nothing where it cannot be read."""
    try:
        return [_verdict(**row) for row in read_json(file_of(known)).get("kernels", [])]
    except (InputError, OSError, TypeError, KeyError):
        return []


def _verdict(**values: Any) -> Verdict:
    for name, value in values.items():
        check_value(name, value, hints(Verdict)[name])
    return Verdict(**values)


def keep(known: Mapping[str, Any], calibration: Calibration, weights: str = "") -> bool:
    """Keep a calibration for the next run, and return whether it was.

    Nothing is kept of what was measured beside other programs.
    """
    if is_loaded(calibration.costs):
        say(
            f"the machine is busy: times differ by {calibration.costs.spread:.0%}, so what was "
            "measured is used with caution, and nothing is kept"
        )
        return False
    values = {
        "drafter_weights": weights,
        "costs": calibration.costs.to_dict(),
        "times": summary(calibration),
        "kernels": [asdict(verdict) for verdict in calibration.kernels],
        "versions": machine.versions(),
        "doubts": _doubts(known),
    }
    return remember(known, "calibration", values)


def doubt(known: Mapping[str, Any]) -> None:
    """Let a calibration be measured again when the machine is quiet: its use contradicts it.

    What is contradicted however often it is measured is left as it is.
    """
    try:
        values, doubts = read_json(file_of(known)), _doubts(known)
        if doubts < MOST_DOUBTS and values["costs"]["spread"] <= LOADED:
            values |= {"costs": values["costs"] | {"spread": DOUBTED}, "doubts": doubts + 1}
            write_whole(file_of(known), json.dumps(values, indent=1) + "\n")
    except (InputError, KeyError, TypeError, OSError):
        return  # there is none that could be used


def _doubts(known: Mapping[str, Any]) -> int:
    """Return how often a calibration was contradicted."""
    try:
        doubts = read_json(file_of(known)).get("doubts", 0)
    except (InputError, OSError):
        return 0
    return doubts if type(doubts) is int else 0


def recall(known: Mapping[str, Any], noun: str, make: Callable[[Any], Made]) -> Made | None:
    """Return what is made of the values that ``remember`` has kept; None if there are none.

    Args:
        known: What they have to hold for.
        noun: What they are, for the sentence about a file that cannot be used.
        make: Raises InputError, KeyError or TypeError of values that it cannot use.
    """
    file = None
    try:
        file = file_of(known)
        if not file.exists():
            return None
        values = read_json(file)
        if values.get("identity") != json.loads(json.dumps(known)):
            raise InputError("it was measured elsewhere")
        return make(values)
    except (InputError, KeyError, TypeError, OSError) as error:
        if file is not None:
            say(f"the {noun} {file} is ignored and measured again: {one_line(error)}")
        return None


def remember(known: Mapping[str, Any], noun: str, values: Mapping[str, Any]) -> bool:
    """Keep values for the next run, or say that this cannot be done; return whether it was."""
    where = "the user's cache folder"
    try:
        file = file_of(known)
        where = file.parent
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"identity": known, **values}, indent=1) + "\n")
    except OSError as error:
        say(f"the {noun} cannot be kept in {where}: {error.strerror or error}")
        return False
    return True


def say(sentence: str) -> None:
    """Print a sentence on stderr."""
    print(f"mlx_distill: {sentence}", file=sys.stderr)
