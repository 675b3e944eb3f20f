"""What the training of a drafter needs in memory, before anything is written."""

import mlx.core as mx

from mlx_distill.arrays import num_bytes
from mlx_distill.distillation.drafter import PAST_ROWS, rows_at_once
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.memory import (
    cached_bytes,
    in_words,
    trained_arrays,
    update_bytes,
)
from mlx_distill.distillation.start_order import spread_of
from mlx_distill.drafters.context_blocks import HEAD_DIM
from mlx_distill.drafters.medusa import MedusaConfig
from mlx_distill.drafters.networks import Network, Shape, network_of
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.target.target import Target


def memory_estimate(target: Target, config: DrafterTraining, width: int, tokens: int) -> str:
    """Return what training needs in memory, in words, before anything is written.

    Args:
        target: Stays loaded.
        config: Says how large the drafter and the batches are.
        width: The longest text, in tokens.
        tokens: Of all answers; what the target computes of them is kept.

    Raises:
        InputError: If that is more than the machine has.
    """
    weights, trained, kept, step = needed_bytes(target, config, width, tokens)
    return in_words(
        {
            "target": weights,
            "drafter and optimizer": trained,
            "what the target computes of the answers": kept,
            f"a step of {config.starts:,} drafts": step,
        },
        "a smaller --feature-gb, --starts, --batch-size or --draft-vocab-size",
    )


def needed_bytes(
    target: Target, config: DrafterTraining, width: int, tokens: int
) -> tuple[int, int, int, int]:
    """Return what the target, what is trained, the features and a step take; nothing is made.

    A step is what it computes, or what the target's reading of a batch does if that is more.
    """
    drafter = network_of(config.network(target))
    arrays = trained_arrays(drafter)
    size = _type_size(target)
    # Weights, float32 masters where they are others, gradients, two moments, and the new ones.
    each = 12 + (size if size == 4 else size + 4)
    trained = each * sum(array.size for array in arrays)
    row = (1 + len(drafter.config.taps)) * drafter.config.hidden_size * size
    kept = min(config.feature_bytes(tokens * row), tokens * row)
    reading = (
        config.batch_size
        * width
        * (cached_bytes(target.model) + (8 * drafter.config.hidden_size * size) + row)
    )
    # What was computed for the gradients is let go before the update.
    step = max(step_bytes(drafter, config, size, tokens), update_bytes(arrays))
    # The target's rows of the tokens that can be drafted stay beside its head.
    step += (drafter.config.draft_vocab_size or 0) * drafter.config.hidden_size * size
    return num_bytes(target.model.parameters()), trained, kept, max(reading, step)


def step_bytes(drafter: Network, config: DrafterTraining, size: int, tokens: int) -> int:
    """Return what a step takes: its unrolled drafts and a chunk of logits.

    The factors are counted from what the forward and its backward keep, and measured.

    Args:
        drafter: What is trained.
        config: Says how many drafts there are.
        size: Bytes of a number.
        tokens: Of all answers; no more drafts than that can start.
    """
    shape = drafter.config
    rows = min(config.starts, tokens) * config.unroll
    chunk = min(rows, rows_at_once(drafter.head)) * 4 * 6 * drafter.head["weight"].shape[0]
    drafts = rows * _kept_numbers(shape) * size + chunk
    if isinstance(shape, MedusaConfig) or not shape.context_blocks:
        return drafts
    kept, backward = _block_bytes(shape, config, size, tokens)
    # When the blocks' gradients are made, of the drafts only inputs and states are left.
    return max(drafts + kept, backward + 9 * rows * shape.hidden_size * size)


def _kept_numbers(shape: Shape) -> int:
    """Return how many numbers are kept of a drafted token, for its gradient and what it learns."""
    if isinstance(shape, MedusaConfig):
        return (5 + 3 * shape.num_draft_layers) * shape.hidden_size
    gates = 1 if shape.cell == "elman" else 3
    kept = 2 * shape.hidden_size + (3 + 2 * gates) * shape.hidden_size
    return kept + (3 + 3 * shape.num_draft_layers) * shape.exit_dim + (shape.head_rank or 0)


def _block_bytes(
    shape: RecurrentDrafterConfig, config: DrafterTraining, size: int, tokens: int
) -> tuple[int, int]:
    """Return what context blocks keep that read the texts of a step, and take for gradients."""
    window = shape.context_window
    # Both ends of a step's answers may lie in other steps.
    tokens_each = max(spread_of(config.starts), 1 / config.start_share)
    rows = min(tokens, int(tokens_each * config.starts * 9 / 8) + 2 * window)
    rows += -rows % (window * max(1, PAST_ROWS // window))
    width, inner = shape.hidden_size, shape.context_heads * HEAD_DIM
    scores = shape.context_heads * 2 * window
    each = scores + 8 * inner + 8 * width
    kept = 6 * width + shape.context_blocks * each
    # The backward of one block at a time has six more arrays of the scores' size.
    return rows * size * kept, rows * size * (kept + 6 * scores)


def _type_size(target: Target) -> int:
    """Return the bytes of a number in the target's type, in which the drafter computes."""
    assert target.embed is not None
    return target.embed(mx.array([0])).dtype.size
