"""What the training of a drafter needs in memory, before anything is written."""

import mlx.core as mx

from mlx_distill.arrays import num_bytes
from mlx_distill.distillation.drafter import goal_rows
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.memory import (
    Batch,
    cached_bytes,
    in_words,
    trained_arrays,
    update_bytes,
)
from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.target.target import Target


def memory_estimate(target: Target, config: DrafterTraining, width: int) -> str:
    """Return what training needs in memory, in words, before anything is written.

    Args:
        target: Stays loaded.
        config: Says how large the drafter and the batches are.
        width: The longest text, in tokens.

    Raises:
        InputError: If that is more than the machine has.
    """
    weights, trained, batch = needed_bytes(target, config, width)
    batch_of = f"a batch of {Batch(config.batch_size, width)}"
    return in_words(
        {"target": weights, "drafter and optimizer": trained, batch_of: batch},
        "a smaller --batch-size, --max-tokens, --prompt-tokens or --draft-vocab-size",
    )


def needed_bytes(target: Target, config: DrafterTraining, width: int) -> tuple[int, int, int]:
    """Return what the target, what is trained, and a batch take; no array is made."""
    drafter = RecurrentDrafter(config.network(target))
    arrays = trained_arrays(drafter)
    size = _type_size(target)
    # Weights, float32 masters where they are others, gradients, two moments, and the new ones.
    each = 12 + (size if size == 4 else size + 4)
    trained = each * sum(array.size for array in arrays) + update_bytes(arrays)
    return (
        num_bytes(target.model.parameters()),
        trained,
        batch_bytes(target, drafter, config, width),
    )


def batch_bytes(
    target: Target, drafter: RecurrentDrafter, config: DrafterTraining, width: int
) -> int:
    """Return what a batch takes: the target's reading, the unrolled drafts, and a chunk of logits.

    The factors are counted from what the forward and its backward keep, and measured.
    """
    shape, size = drafter.config, _type_size(target)
    rows = config.batch_size * min(width, config.responses.max_tokens)
    reading = (
        config.batch_size * width * (cached_bytes(target.model) + 8 * shape.hidden_size * size)
    )
    exit_dim = drafter.head["weight"].shape[1]
    per_draft = 5 * shape.hidden_size + (3 + 3 * shape.num_draft_layers) * exit_dim
    unrolled = rows * config.unroll * per_draft * size
    goals = goal_rows(drafter.head, config.unroll)
    drafted = config.unroll * drafter.head["weight"].shape[0]
    chunk = goals * 4 * (3 * shape.vocab_size + 5 * drafted)
    return max(reading, unrolled + chunk) + rows * 2 * shape.hidden_size * size


def _type_size(target: Target) -> int:
    """Return the bytes of a number in the target's type, in which the drafter computes."""
    assert target.embed is not None
    return target.embed(mx.array([0])).dtype.size
