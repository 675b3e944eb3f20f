"""One text of a batch, and what a call of the batch adds to it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Int

from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.speculation.cycle import Cycle
from mlx_distill.speculation.decoding import DecodedToken
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.target.batch.call import RowsCall
from mlx_distill.target.batch.rows import Rows


class Held(NamedTuple):
    """What a text's cache has to hold.

    Args:
        rows: So many tokens of its row.
        missing: The token behind them, which the target has not read; None for none.
    """

    rows: int
    missing: int | None


@dataclass(eq=False)
class BatchedText:
    """A text of a batch.

    Args:
        number: Of it, for whoever asked for it.
        decoding: What it needs.
        prompt: What it goes on with.
        kind: Of its rows; it shares calls with texts of the same kind.

    Attributes:
        root: The token that is certain and not in the cache.
        draft: What may follow it.
        history: The text up to the root, for processors.
        num_tokens: Of its answer, the root included.
        held: What was handed out; None while the prompt is not read.
        start: Tokens that the target had read before the cycle that is handed out.
        own: Its row, once it shares no calls any more.
        ended: Whether nothing more is asked for.
    """

    number: int
    decoding: Decoding
    prompt: Int[mx.array, " T"]
    kind: Hashable
    root: mx.array | None = None
    draft: PrefixTree | Draft | None = None
    history: mx.array | None = None
    num_tokens: int = 0
    held: Held | None = None
    start: int = 0
    own: Rows | None = None
    ended: bool = False

    def hand_out(self, number: int, path: int, token: int) -> None:
        """Take note that a token is handed out: of ``path`` accepted nodes the ``number``-th's."""
        last = number == path
        self.held = Held(self.start + min(number + 1, path), token if last else None)


@dataclass(frozen=True)
class Written:
    """What a step added to a text.

    Args:
        text: It.
        tokens: In order.
        error: What ended the text instead; None if nothing did.
    """

    text: BatchedText
    tokens: Sequence[DecodedToken] = ()
    error: Exception | None = None


@dataclass
class Flight:
    """A call that is on its way.

    Args:
        call: The target's.
        cycles: The texts that take part, a row each, and their parts of it.
    """

    call: RowsCall
    cycles: list[tuple[BatchedText, Cycle]] = field(default_factory=list)
