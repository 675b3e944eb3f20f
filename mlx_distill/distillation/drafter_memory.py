"""What the training of a drafter needs in memory, before anything is written."""

import mlx.core as mx

from mlx_distill import machine
from mlx_distill.arrays import num_bytes, num_values
from mlx_distill.distillation.drafter import goal_rows
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.errors import InputError
from mlx_distill.target.reading import fresh_caches
from mlx_distill.target.target import Target

# Of a trained parameter: itself, its float32 master, gradient and two moments, and the new ones.
TRAINED_BYTES = 28


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
    total = weights + trained + batch
    text = (
        f"memory: about {total / 1e9:.2f} GB (target {weights / 1e9:.2f}, drafter and optimizer "
        f"{trained / 1e9:.2f}, a batch of {config.batch_size} x {width} tokens {batch / 1e9:.2f})"
    )
    if total > machine.memory_bytes():
        raise InputError(
            f"{text}, but this machine has {machine.memory_bytes() / 1e9:.1f} GB; "
            "use a smaller --batch-size, --max-tokens, --prompt-tokens or --draft-vocab-size"
        )
    return text


def needed_bytes(target: Target, config: DrafterTraining, width: int) -> tuple[int, int, int]:
    """Return what the target, what is trained, and a batch take; no array is made."""
    drafter = RecurrentDrafter(config.network(target))
    trained = TRAINED_BYTES * num_values(drafter.trainable_parameters())
    weights = num_bytes(target.model.parameters())
    return weights, trained, batch_bytes(target, drafter, config, width)


def batch_bytes(
    target: Target, drafter: RecurrentDrafter, config: DrafterTraining, width: int
) -> int:
    """Return what a batch takes: the target's reading, the unrolled drafts, and a chunk of logits.

    The factors are counted from what the forward and its backward keep, and measured.
    """
    shape = drafter.config
    embed = target.embed
    assert embed is not None
    size = embed(mx.array([0])).dtype.size
    rows = config.batch_size * min(width, config.responses.max_tokens)
    reading = config.batch_size * width * (_cached_bytes(target) + 8 * shape.hidden_size * size)
    exit_dim = drafter.head["weight"].shape[1]
    per_draft = 5 * shape.hidden_size + (3 + 3 * shape.num_draft_layers) * exit_dim
    unrolled = rows * config.unroll * per_draft * size
    goals = goal_rows(drafter.head, config.unroll)
    drafted = config.unroll * drafter.head["weight"].shape[0]
    chunk = goals * 4 * (3 * shape.vocab_size + 5 * drafted)
    return max(reading, unrolled + chunk) + rows * 2 * shape.hidden_size * size


def _cached_bytes(target: Target) -> int:
    """Return what the target keeps of a token that it reads; nothing is computed."""
    caches = fresh_caches(target.model)
    target.model(mx.array([[0, 0]]), cache=caches)
    return num_bytes([cache.state for cache in caches]) // 2
