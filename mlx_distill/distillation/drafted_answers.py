"""A target's answers written with a drafter, where that was found to be faster.

mlx-lm's way of writing many texts (``answer_batch``) is the rule. Where batches of as many texts,
written by ``batch_generate``, were seen to gain by a bundled drafter on this machine, answers are
written so, too. Nothing is timed for that.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx import nn

from mlx_distill.calibration.batches import batch_choice
from mlx_distill.calibration.pair import Pair
from mlx_distill.distillation.answer_batch import Wanted
from mlx_distill.drafters.protocol import Drafter
from mlx_distill.drafters.registry import bundled_drafter
from mlx_distill.speculation.batch_generation import stream_answers


def drafter_that_pays(model: nn.Module, tokenizer: Any, rows: int) -> Drafter | None:
    """Return a bundled drafter with which so many texts are known to be written faster, or None."""
    found = bundled_drafter(model, tokenizer)
    if found is None:
        return None
    choice = batch_choice(Pair(model, tokenizer, found[1]), rows)
    return found[1] if choice is not None and choice.drafts_pay else None


def drafted(
    model: nn.Module, tokenizer: Any, drafter: Drafter, wanted: Sequence[Wanted], rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield what ``answer_batch.written`` yields: the same law, with random numbers of its own."""
    each = [
        {"max_tokens": one.most, "temperature": one.temperature, "seed": one.seed} for one in wanted
    ]
    prompts = [one.prompt for one in wanted]
    options = {"each": each, "batch": rows, "drafter": drafter}
    for answer in stream_answers(model, tokenizer, prompts, **options):
        if answer.error is not None:
            raise answer.error
        yield answer.index, answer.tokens
