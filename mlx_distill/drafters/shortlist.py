"""A shortlist of the columns that may be the likeliest, found with a narrower head.

On a processor a draft is as dear as the head's weights are many: they are read once for every
depth. A head of V rows of width E is all but a matrix of fewer columns times a basis: what it says
in the basis's directions names the columns that are worth asking, and only their rows are read:

    columns = best of  (x B) (W B)'      B: the R directions that W's rows lie in most
    logits  = x W[columns]'

The directions that matter are those in which rows differ where the head's inputs lie. Of these a
folder's ``shortlist.safetensors`` knows, from held-out answers: with it half as many columns have
to be listed. Columns that are not listed count as impossible; a draft may be any, so this costs
acceptance at the most.

    x W' = (x S^-1) (W S)'      S S = E[x x'], and B the directions that W S lies in most
"""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import all_finite, by_columns
from mlx_distill.core.beam_search import Listed
from mlx_distill.errors import InputError
from mlx_distill.safetensors import check_floats, check_safetensors, read_arrays

FILE = "shortlist.safetensors"
DIRECTIONS, LISTED = 128, 512
# Finding the directions takes time with the cube of the width: 0.1 s at 576. A part of the rows
# tells them.
WIDEST, ASKED_ROWS = 1024, 4096
# Inputs that were not seen may lie anywhere: to all directions this share of the mean is added.
UNSEEN = 0.1


class Directions(NamedTuple):
    """What a head says is about ``(x into) (W back)'``.

    Args:
        into: Of the head's inputs, (E, R).
        back: Of the head's rows, (E, R).
    """

    into: mx.array
    back: mx.array


def directions_of(
    weight: Float[mx.array, "V E"], inputs: Float[mx.array, "N E"] | None = None
) -> Directions:
    """Return the directions that tell most of what a head says.

    Args:
        weight: The head's.
        inputs: Some of what it is given; None where nothing is known of that.
    """
    rows = weight[:: max(1, weight.shape[0] // ASKED_ROWS)].astype(mx.float32)
    if inputs is None:
        basis = _largest(rows.T @ rows)
        return Directions(basis, basis)
    inputs = inputs.astype(mx.float32)
    moments = inputs.T @ inputs
    mean = mx.trace(moments) / moments.shape[0]
    sizes, axes = mx.linalg.eigh(moments / mean, stream=mx.cpu)
    spread = mx.sqrt(mx.maximum(sizes, 0) + UNSEEN)
    seen = rows @ (axes * spread)
    basis = _largest(seen.T @ seen)
    return Directions((axes / spread) @ basis, (axes * spread) @ basis)


def _largest(moments: Float[mx.array, "E E"]) -> Float[mx.array, "E R"]:
    return mx.linalg.eigh(moments, stream=mx.cpu)[1][:, -DIRECTIONS:]


def is_wide(weight: Float[mx.array, "V E"]) -> bool:
    """Return whether a head is one that a shortlist can save time of."""
    return weight.shape[0] >= 16 * LISTED and 4 * DIRECTIONS <= weight.shape[1] <= WIDEST


def read_directions(folder: Path, width: int) -> Directions | None:
    """Return the directions that a drafter's folder knows, for a head of such rows; or None.

    Raises:
        InputError: If they are damaged, or of another head.
    """
    file = folder / FILE
    if not file.exists():
        return None
    check_safetensors(file)
    arrays = read_arrays(file)
    shapes = {x.shape for x in arrays.values()}
    fits = arrays.keys() == set(Directions._fields) and len(shapes) == 1
    if (
        not fits
        or len(shape := shapes.pop()) != 2
        or shape[0] != width
        or not 0 < shape[1] <= width
    ):
        raise InputError(f"{file} does not fit the drafter beside it; remove it, or train anew")
    check_floats(arrays, file)
    found = Directions(**{name: x.astype(mx.float32) for name, x in arrays.items()})
    if not all(map(all_finite, found)):
        raise InputError(f"{file} holds values that are no finite numbers")
    return found


class Shortlist:
    """The narrower head of a head that does not change any more.

    Args:
        weight: The head's.
        directions: That its folder knows; None to go by the weight alone.
    """

    def __init__(self, weight: Float[mx.array, "V E"], directions: Directions | None = None):
        self._weight = weight
        self._listed = LISTED if directions is None else LISTED // 2
        into, back = directions or directions_of(weight)
        self._into = by_columns(into)
        self._narrow = mx.contiguous(weight @ back).T
        mx.eval(self._into, self._narrow)

    @staticmethod
    def pays(weight: Float[mx.array, "V E"]) -> bool:
        """Return whether a shortlist saves time on a processor."""
        return is_wide(weight) and weight.dtype == mx.float32

    def __call__(
        self,
        x: Float[mx.array, "W E"],
        noise: Float[mx.array, "_ V"] | None,
        sharpness: float,
        token_ids: Int[mx.array, " V"] | None,
    ) -> Listed:
        """Return the sharpened logits of the listed columns, after the noise is added.

        Args:
            x: What the head makes logits of.
            noise: Of all columns; None at temperature 0.
            sharpness: What the logits are multiplied by.
            token_ids: What the columns stand for; None if they are the token ids.
        """
        about = (x @ self._into) @ self._narrow
        if noise is not None:
            about = about + noise
        columns = self._best_of_each(about)
        logits = (x[:, None] @ self._weight[columns].swapaxes(-1, -2)).squeeze(-2)
        if noise is not None:
            noise = mx.broadcast_to(noise, about.shape)
            logits = logits + mx.take_along_axis(noise, columns, axis=-1)
        tokens = columns if token_ids is None else token_ids[columns]
        return Listed(sharpness * logits, tokens)

    def _best_of_each(self, logits: Float[mx.array, "W V"]) -> Int[mx.array, "W C"]:
        """Return the best column of every group; the n-th has each C-th column from n on."""
        rows, columns = logits.shape
        if spare := -columns % self._listed:
            logits = mx.pad(logits, [(0, 0), (0, spare)], constant_values=-mx.inf)
        groups = logits.reshape(rows, -1, self._listed)
        return mx.argmax(groups, axis=1) * self._listed + mx.arange(self._listed)
