"""A trained drafter's head made of two matrices that are nearest to it where it is used.

    logits = W x          W (K, E), x what the head is given
    W x  ~  A (B x)       A (K, R), B (R, E)

Of all matrices of rank R, A B has the least expected square of W x - A B x over what the head is
given along drafts of the target's answers: it is the nearest to W C^(1/2), with C the mean of x x',
by the singular vectors of that product. What all logits of a row have in common changes no
probability, so the mean of W's rows is taken away before.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.distillation.drafted_head import factored
from mlx_distill.distillation.drafter import unroll
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.target_reader import TargetReader, text_of
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.packing import read_unquantised, write_changed
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.errors import InputError
from mlx_distill.files import usable_path
from mlx_distill.target.target import Target

UNROLL = 5  # tokens of a draft
STARTS = 256  # drafts at once
MOST_STARTS = 4096
BATCH_SIZE = 8  # texts that the target reads at once
# Directions that the head is given less of than this share of the largest do not count.
LEAST_SHARE = 1e-7


def narrow_head(
    folder: str | Path,
    output: str | Path,
    rank: int,
    drafter: BoundDrafter,
    target: Target,
    answers: Sequence[Response],
) -> None:
    """Write a drafter's folder anew with a head of two matrices.

    Args:
        folder: The drafter's folder; left as it is.
        output: The new one; must not exist. It gets all text files of the old one, too.
        rank: Width between the two, less than the head's.
        drafter: That of the folder.
        target: Its target.
        answers: The target's.

    Raises:
        InputError: If the folder's head cannot be narrowed, or nothing can be written.
    """
    source = usable_path(folder, "the drafter")
    fields, arrays = read_unquantised(source)
    shape = drafter.config
    if shape.head_rank:
        raise InputError(f"{source} has a head of two matrices already")
    if not 1 <= rank < shape.exit_dim:
        raise InputError(f"the rank must lie between 1 and {shape.exit_dim - 1}, got {rank}")
    spread = second_moment(drafter, target, answers)
    last = f"lm_head.{shape.num_draft_layers}.weight"
    head, before = narrowed(arrays[last], spread, rank)
    arrays |= {last: before, f"lm_head.{shape.num_draft_layers + 1}.weight": head}
    write_changed(source, usable_path(output, "the output"), {**fields, "head_rank": rank}, arrays)


def narrowed(
    weight: Float[mx.array, "K E"], spread: np.ndarray, rank: int
) -> tuple[Float[mx.array, "K R"], Float[mx.array, "R E"]]:
    """Return the two matrices whose product is nearest to a head where it is used.

    Args:
        weight: Of the head.
        spread: The mean of x x' over its inputs, (E, E).
        rank: Width between the two.
    """
    values, directions = np.linalg.eigh(spread)
    sizes = np.sqrt(np.maximum(values, LEAST_SHARE * values[-1]))
    root, inverse = ((directions * by) @ directions.T for by in (sizes, 1 / sizes))
    rows = np.array(weight.astype(mx.float32), np.float64)
    head, before = factored(mx.array(((rows - rows.mean(axis=0)) @ root).astype(np.float32)), rank)
    before = mx.array((np.array(before, np.float64) @ inverse).astype(np.float32))
    return head.astype(weight.dtype), before.astype(weight.dtype)


def second_moment(drafter: BoundDrafter, target: Target, answers: Sequence[Response]) -> np.ndarray:
    """Return the mean of x x' over what a drafter's head is given along drafts, (E, E)."""
    shape: RecurrentDrafterConfig = drafter.config
    look_back = shape.context_window if shape.context_blocks else 0
    reader = TargetReader(target, shape.taps, BATCH_SIZE, look_back)
    view = reader.view([text_of(one) for one in answers if len(one.response) > 1])
    places = view.starting[:: -(-view.starting.size // MOST_STARTS)]
    total, count = np.zeros((shape.exit_dim, shape.exit_dim)), 0.0
    for first in range(0, places.size, STARTS):
        starts = view.starts(places[first : first + STARTS], UNROLL, look_back)
        x = unroll(drafter.network, starts).reshape(-1, shape.exit_dim).astype(mx.float32)
        mask = starts.mask.reshape(-1, 1)
        total += np.array((x * mask).T @ x, np.float64)
        count += float(mask.sum())
    return total / count
