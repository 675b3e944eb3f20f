"""The target's logits of the tokens that can be drafted, without making all the others."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.arrays import to_number
from mlx_distill.distillation.drafter import Logits
from mlx_distill.distillation.teachers import Answers
from mlx_distill.drafters.networks import Network
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.target.body import TiedHead

# Rows that were dequantised round a product otherwise than a quantised one does.
MOST_DIFFERENCE = 0.02


def drafted_logits(
    answers: Answers, goals: Float[mx.array, "N G"], token_ids: Int[mx.array, " K"] | None
) -> Logits:
    """Return what makes the logits of the tokens that can be drafted.

    Args:
        answers: The target's.
        goals: Some of what it makes logits of; the shorter way is tried on them.
        token_ids: The tokens; None for all.
    """
    if token_ids is None:
        return answers.logits

    def of_all(goals: mx.array) -> mx.array:
        return answers.logits(goals)[..., token_ids]

    rows = head_rows(answers, token_ids)
    if rows is None or rows.shape[-1] != goals.shape[-1]:
        return of_all
    matrix = rows.T
    expected = of_all(goals).astype(mx.float32)
    found = (goals @ matrix).astype(mx.float32)
    off = mx.sqrt(mx.mean(mx.square(found - expected)) / mx.mean(mx.square(expected)))
    # A head that scales, caps or shifts its logits is no matrix alone.
    return (lambda goals: goals @ matrix) if to_number(off) <= MOST_DIFFERENCE else of_all


def head_rows(answers: Answers, token_ids: Int[mx.array, " K"]) -> Float[mx.array, "K G"] | None:
    """Return some tokens' rows of the target's head; None if it has no matrix of its own."""
    head = answers.body.head if answers.body else None
    if isinstance(head, TiedHead):
        return head.embed(token_ids)
    if isinstance(head, nn.Linear):
        return head["weight"][token_ids]
    if isinstance(head, nn.QuantizedLinear):
        parts = [head[name][token_ids] for name in ("weight", "scales", "biases") if name in head]
        options = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
        return mx.dequantize(*parts, **options)
    return None


def start_head(network: Network, rows: Float[mx.array, "K G"]) -> Float[mx.array, "X G"] | None:
    """Start a drafter's head from the target's: a narrower one from what is nearest to that.

    A head that is wider than the target's stays as it is.

    Args:
        network: The drafter's.
        rows: Of the target's head, for the tokens that can be drafted.

    Returns:
        What makes the input of the drafter's head of that of the target's; None if nothing does.
    """
    width, goal = network.head.weight.shape[-1], rows.shape[-1]
    shape = network.config
    recurrent = isinstance(shape, RecurrentDrafterConfig)
    rank, exit_dim = (shape.head_rank, shape.exit_dim) if recurrent else (None, None)
    if width < goal:
        narrow, directions = factored(rows, width)
        network.head.weight = narrow
        if rank and exit_dim == goal:
            network.lm_head[-2].weight = directions
            return mx.eye(goal)
        return None if rank else directions
    if width == goal:
        network.head.weight = rows
        return None if rank else mx.eye(goal)
    return None


def factored(
    rows: Float[mx.array, "K G"], rank: int
) -> tuple[Float[mx.array, "K R"], Float[mx.array, "R G"]]:
    """Return two matrices whose product is as near to a head as any of their rank.

    The second holds the directions in which the rows reach furthest, each of length 1.

    Args:
        rows: Of the head.
        rank: At most the rows' width.

    Source:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    values = np.array(rows.astype(mx.float32))
    _, directions = np.linalg.eigh(values.T @ values)  # the furthest last
    kept = directions[:, -rank:]
    narrow, kept = values @ kept, np.ascontiguousarray(kept.T)
    return mx.array(narrow).astype(rows.dtype), mx.array(kept).astype(rows.dtype)
