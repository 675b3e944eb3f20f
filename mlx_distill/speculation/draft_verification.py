"""Which way the chains of a draft model are verified.

As a block: they are drawn from the draft model's own law, and judged as a whole. More is accepted,
and which text a seed gives depends on what was drafted.

Coupled: they are made in sight of the text's noise, and followed as far as they are what is drawn.
A seed gives the text that it gives without them.
"""

from typing import Annotated

import mlx.core as mx

from mlx_distill.core.block_verification import OnceNoise
from mlx_distill.drafters.draft_model import DraftModelDrafter
from mlx_distill.drafters.protocol import Drafter, FixedPlanner
from mlx_distill.errors import InputError
from mlx_distill.limits import OneOf, check_value
from mlx_distill.speculation.requests import Request

BLOCK, COUPLED = "block", "coupled"
# None takes blocks where they can be taken.
Verification = Annotated[str | None, OneOf(BLOCK, COUPLED)]


def takes_blocks(request: Request, asked: str | None, exact_rows: bool) -> bool:
    """Return whether the chains of a text's draft model are drawn, and verified as blocks.

    Args:
        request: The text.
        asked: What was asked for; None takes blocks where that can be done.
        exact_rows: Whether the text has to be the plainly decoded one.

    Raises:
        InputError: If blocks are asked for where they cannot be had.
    """
    check_value("draft_verification", asked, Verification)
    if asked == COUPLED or not request.sampling.temperature:
        return False
    why = _why_not(request, exact_rows)
    if why is not None and asked == BLOCK:
        raise InputError(f"drafts cannot be verified as blocks: {why}")
    return why is None


def once_noise(drafter: Drafter, key: mx.array, vocab_size: int) -> OnceNoise | None:
    """Return the random numbers of drawn drafts; None for a drafter that does not draw.

    Args:
        drafter: Of the text.
        key: Of the text's noise.
        vocab_size: The target's.
    """
    if not isinstance(drafter, DraftModelDrafter) or drafter.law is None:
        return None
    # Of two keys, one would be that of the first rows of the text's noise.
    return OnceNoise(mx.random.split(key, 3)[2], vocab_size)


def _why_not(request: Request, exact_rows: bool) -> str | None:
    planner = request.planner
    if exact_rows:
        return "exact rows promise the plainly decoded text; leave either out"
    if request.logits_processors:
        return "logits processors see a text token by token; take coupled draws"
    if not isinstance(planner, FixedPlanner):
        return "their shape is planned by what is seen of the text; take coupled draws"
    if planner.plan.beam_width > 1 or planner.plan.tree != "best-first":
        return "blocks are chains; leave trees out, or take coupled draws"
    return None
