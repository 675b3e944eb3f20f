"""Checkpoints of other projects: what is common to reading them.

Nothing pickled is ever read, nothing is built before a file is known to hold as much, and whatever
does not fit is named.
"""

from pathlib import Path

import mlx.core as mx

from mlx_distill.arrays import all_finite
from mlx_distill.errors import InputError
from mlx_distill.files import read_json
from mlx_distill.safetensors import check_floats, read_arrays, read_header, refuse_pickled
from mlx_distill.untyped import Fields

MOST_NAMED = 8  # arrays in one sentence
Shapes = dict[str, tuple[int, ...]]


def read_config(source: Path) -> Fields:
    """Return a folder's configuration.

    Raises:
        InputError: If there is none; how what is pickled can be converted is said.
    """
    if not (source / "config.json").exists():
        refuse_pickled(source)
        raise InputError(f"{source} holds no config.json, so it is not a drafter's folder")
    return read_json(source / "config.json")


def weights_file(source: Path) -> Path:
    """Return the one safetensors file of a folder.

    Raises:
        InputError: If there is none, or several; how what is pickled can be converted is said.
    """
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        refuse_pickled(source)
    raise InputError(f"{source} must hold one safetensors file, it holds {len(files)}")


def shapes_in(weights: Path) -> Shapes:
    """Return the shapes of a file's arrays; nothing else of it is read."""
    return {name: one.shape for name, one in read_header(weights).items()}


def renamed(weights: Path, header: Shapes, names: dict[str, str]) -> Shapes:
    """Return the shapes of a file's arrays under our names, without what is left out.

    Args:
        weights: The file.
        header: The shapes of its arrays.
        names: What each of them is called here; "" for what is left out.

    Raises:
        InputError: If two of its arrays are the same one of ours; they are named.
    """
    used = [names[name] for name in header if names[name]]
    twice = [name for name in header if names[name] and used.count(names[name]) > 1]
    if twice:
        raise InputError(f"{weights} holds an array more than once: {_listed(twice)}")
    return {names[name]: shape for name, shape in header.items() if names[name]}


def read_finite(weights: Path, names: dict[str, str]) -> dict[str, mx.array]:
    """Return the arrays of a file.

    Args:
        weights: The file.
        names: What each of its arrays is called here; "" for what is left out.

    Raises:
        InputError: If one holds what is no finite number, all such are named, or no floats.
    """
    read = {name: x for name, x in read_arrays(weights).items() if names[name]}
    check_floats(read, weights)
    arrays = {names[name]: x for name, x in read.items()}
    wrong = [name for name, x in arrays.items() if not all_finite(x)]
    if wrong:
        raise InputError(f"{weights}: {_listed(wrong)} holds values that are no finite numbers")
    return arrays


def check_shapes(weights: Path, found: Shapes, expected: Shapes) -> None:
    """Raise InputError if arrays are missing, unknown or misshapen; each is named."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} is of shape {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise InputError(f"{weights} does not fit its config: {_listed(wrong)}")


def _listed(wrong: list[str]) -> str:
    """Return some of many complaints in one sentence."""
    more = f", and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return ", ".join(wrong[:MOST_NAMED]) + more
