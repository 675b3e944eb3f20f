"""What a drafter learns: the target's distributions, along its own unrolled states.

For every position t of a text that the target wrote, the drafter starts from the hidden state h_t,
reads x_{t+1}, x_{t+2}, ... and after each of them is asked for the next token; the target's answer
at that position is the goal. All starting points of a batch are unrolled at once:

    position       t        t+1       t+2       t+3
    target         h_t      p_{t+1}   p_{t+2}   p_{t+3}
    drafter reads           x_{t+1}   x_{t+2}   x_{t+3}
    loss                    KL(p_{t+1} || q_1) + 0.8 KL(p_{t+2} || q_2) + 0.64 KL(...) ...
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.losses.response import entropy, kl_divergence


@dataclass(frozen=True)
class TargetView:
    """What the target says of a batch of texts; nothing in it has a gradient.

    Args:
        hidden: What its head saw.
        probs: Of the tokens that can be drafted, normalised over them.
        entropy: Of ``probs``, in nats.
        embeddings: Of the texts' tokens.
        starts: 1 where a draft may start: h_t belongs to the answer and x_{t+1} exists.
        inside: 1 where the text has a token.
    """

    hidden: Float[mx.array, "B T D"]
    probs: Float[mx.array, "B T K"]
    entropy: Float[mx.array, "B T"]
    embeddings: Float[mx.array, "B T E"]
    starts: Float[mx.array, "B T"]
    inside: Float[mx.array, "B T"]


def view_of_target(
    logits: Float[mx.array, "B T V"],
    hidden: Float[mx.array, "B T D"],
    embeddings: Float[mx.array, "B T E"],
    prompt_lengths: Int[mx.array, " B"],
    lengths: Int[mx.array, " B"],
    token_ids: Int[mx.array, " K"] | None,
) -> TargetView:
    """Return the target's view of a batch of texts.

    Args:
        logits: The target's.
        hidden: What its head saw.
        embeddings: Of the texts' tokens.
        prompt_lengths: Number of leading tokens that the target did not write.
        lengths: Number of tokens of every text; what follows is padding.
        token_ids: The tokens that can be drafted; None for all.
    """
    if token_ids is not None:
        logits = logits[..., token_ids]
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    at = mx.arange(logits.shape[1])[None]
    starts = (at >= prompt_lengths[:, None] - 1) & (at < lengths[:, None] - 1)
    inside = at < lengths[:, None]
    arrays = (hidden, mx.exp(log_probs), entropy(log_probs), embeddings, starts, inside)
    return TargetView(*(mx.stop_gradient(x.astype(mx.float32)) for x in arrays))


def unroll(
    drafter: RecurrentDrafter, view: TargetView, length: int
) -> Iterator[tuple[mx.array, slice, mx.array]]:
    """Yield, for each of ``length`` drafted tokens, the drafter's logits, where, and the mask.

    "Where" are the positions of the view at which the target answers the same question.

    Drafts start at every position but the last ``length``; the mask says which of them count.
    """
    num_starts = view.hidden.shape[1] - length
    context = drafter.context(view.hidden[:, :num_starts])
    read = drafter.read(view.embeddings)
    state = None
    for step in range(1, length + 1):
        here = slice(step, step + num_starts)
        state = drafter.advance(state, read[:, here])
        mask = view.starts[:, :num_starts] * view.inside[:, here]
        yield drafter.logits(context, state), here, mask


def drafter_loss(
    drafter: RecurrentDrafter, view: TargetView, length: int, decay: float = 0.8
) -> tuple[mx.array, mx.array]:
    """Return the weighted sum of KL(target || drafter) over an unrolled draft, and its count.

    Args:
        drafter: The student.
        view: The target's view of a batch.
        length: Drafted tokens per start.
        decay: The i-th drafted token weighs ``decay ** (i - 1)``.
    """
    total, count = mx.array(0.0), mx.array(0.0)
    for step, (logits, here, mask) in enumerate(unroll(drafter, view, length)):
        target = (view.probs[:, here], view.entropy[:, here])
        step_total, step_count = kl_divergence(*target, logits, mask)
        total += decay**step * step_total
        count += decay**step * step_count
    return total, count


def acceptance_by_depth(
    drafter: RecurrentDrafter, view: TargetView, length: int
) -> tuple[Float[mx.array, "2 L"], Float[mx.array, " L"]]:
    """Return summed acceptances of a drafted chain by depth, and their counts.

    Row 0 counts greedy agreement: how often the drafter's best token is the target's best, where
    the text itself is what was drafted before. Row 1 sums the probability with which sampling at
    temperature 1 would take the drafter's best token.
    """
    rows, counts = [], []
    for logits, here, mask in unroll(drafter, view, length):
        probs = view.probs[:, here]
        best = mx.argmax(logits, axis=-1)
        agreed = (best == mx.argmax(probs, axis=-1)).astype(mx.float32)
        taken = mx.take_along_axis(probs, best[..., None], axis=-1)[..., 0]
        rows.append(mx.stack([(agreed * mask).sum(), (taken * mask).sum()]))
        counts.append(mask.sum())
    return mx.stack(rows, axis=1), mx.stack(counts)
