"""A text's state for drafters with context blocks: what the blocks have read of it.

A row of the blocks is what the target computed at a token, and the token that follows. So the rows
of what a call made text can be read when the next root is known, which is when it is drafted from:

    accept  A B C       rows A-B  B-C  C-?        wait
    draft   root D      rows A-B  B-C  C-D        are read; the last one's context is the draft's
    accept  D E         what was read is kept; rows D-E  E-?   wait

Where a text is parked, nothing is drafted and the rows wait until they are many. How many tokens a
call made text is known on the device alone, so arrays may have rows behind the last one.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.arrays import SERIAL, to_number
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.context_blocks import Kept
from mlx_distill.drafters.protocol import DraftPlan, Features, beside
from mlx_distill.drafters.recurrent import RecurrentDrafter

# Calls whose tokens can be forgotten again without forgetting the text.
MOST_REWOUND = 8
# Rows that wait while nothing is drafted.
MOST_WAITING = 64


@dataclass(frozen=True)
class Rows:
    """Consecutive tokens of a text, and what the target computed there.

    Args:
        tokens: The tokens; -1 behind the last one.
        hidden: What its head saw.
        taps: What the tapped layers returned.
        whole: Whether all of them are tokens.
    """

    tokens: Int[mx.array, " T"]
    hidden: Float[mx.array, "T D"]
    taps: tuple[Float[mx.array, "T _"], ...]
    whole: bool

    def then(self, later: "Rows") -> "Rows":
        """Return whole rows with later ones behind them."""
        pairs = zip(
            (self.tokens, self.hidden, *self.taps),
            (later.tokens, later.hidden, *later.taps),
            strict=True,
        )
        tokens, hidden, *taps = (mx.concatenate(list(pair)) for pair in pairs)
        return Rows(tokens, hidden, tuple(taps), later.whole)


@dataclass(frozen=True)
class Record:
    """What a text's blocks have read, and what waits.

    Args:
        kept: Of what was read.
        waiting: What was accepted since.
    """

    kept: Kept
    waiting: tuple[Rows, ...] = ()

    @property
    def num_waiting(self) -> int:
        """How many rows wait."""
        return sum(rows.tokens.size for rows in self.waiting)


class ContextReader:
    """Reads rows with a drafter's blocks.

    Args:
        network: The drafter's network, which does not change any more.
        embed: The target's input embedding.
        compiled: Whether a reading is compiled.
    """

    def __init__(self, network: RecurrentDrafter, embed: nn.Module, compiled: bool):
        self._network, self._embed = network, embed
        self._serial = next(SERIAL)
        self._read: Callable[..., tuple[mx.array, mx.array, mx.array]] = self._rows
        if compiled:
            self._read = mx.compile(self._rows)

    def nothing(self) -> Record:
        """Return the record of a text of which nothing was read."""
        return Record(self._network.blocks.nothing(self._network.head.weight.dtype))

    def read(
        self, record: Record, root: Int[mx.array, " 1"]
    ) -> tuple[Float[mx.array, " D"], Record]:
        """Return the context at the last of the rows that wait, and the record behind it.

        Args:
            record: Something waits.
            root: The token that follows what waits.
        """
        parts = [record.waiting[0]]
        for rows in record.waiting[1:]:
            if parts[-1].whole:
                parts[-1] = parts[-1].then(rows)
            else:
                parts.append(rows)
        kept, context = record.kept, None
        for place, rows in enumerate(parts):
            follows = root if place + 1 == len(parts) else parts[place + 1].tokens[:1]
            context, *arrays = self._read(
                self._serial, rows.hidden, list(rows.taps), rows.tokens, follows, *kept
            )
            kept = Kept(*arrays)
        assert context is not None
        return context, Record(kept)

    def everywhere(
        self, joined: Float[mx.array, "T D"], following: Int[mx.array, " T"]
    ) -> Float[mx.array, "T D"]:
        """Return the contexts at all tokens of a text, of which nothing was read before.

        Args:
            joined: What the target computed at them.
            following: The token that follows each.
        """
        count = joined.shape[0]
        padding = -count % self._network.config.context_window
        rows = mx.pad(joined, [(0, padding), (0, 0)])
        embeddings = self._embed(mx.pad(following, (0, padding)))
        behind = mx.arange(count + padding)
        return self._network.blocks(rows, embeddings, behind)[:count]

    def _rows(
        self,
        serial: int,
        hidden: mx.array,
        taps: list[mx.array],
        tokens: mx.array,
        follows: mx.array,
        rows: mx.array,
        known: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        following = mx.concatenate([tokens[1:], mx.array([-1])])
        following = self._embed(mx.where(following < 0, follows, following))
        count = (tokens >= 0).sum()
        joined = self._network.joined(hidden, beside(taps) if taps else None)
        context, kept = self._network.blocks.go_on(Kept(rows, known), joined, following, count)
        return context, kept.rows, kept.known


class AttendingState:
    """One text's state.

    Args:
        reader: Reads.
        drafts: Makes a draft of a context and its root, of a shape, with noise or without.
        window: How many rows the blocks see.
        prompt: The tokens before the first root.
        features: Those of the last of them.
    """

    def __init__(
        self,
        reader: ContextReader,
        drafts: Callable[[mx.array, mx.array, DraftPlan, mx.array | None], Draft],
        window: int,
        prompt: Int[mx.array, " T"],
        features: Features,
    ):
        self._reader, self._drafts = reader, drafts
        hidden, taps = features.hidden[-window:], [tap[-window:] for tap in features.tapped]
        count = min(prompt.size, hidden.shape[0])
        first = Rows(prompt[-count:], hidden[-count:], tuple(tap[-count:] for tap in taps), True)
        self._record = Record(reader.nothing().kept, (first,))
        self._drafted: Record | None = None  # the record if the latest draft's root is accepted
        self._before: deque[tuple[Record, Rows]] = deque(maxlen=MOST_REWOUND)

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return the beams that follow a root; None if all that is known was forgotten."""
        if not self._record.waiting:
            return None
        context, self._drafted = self._reader.read(self._record, root)
        return self._drafts(context, root, plan, noise)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Let the rows of the accepted tokens wait until the next root is known."""
        whole = features.walk is None or tokens.size == 1
        self._accept(Rows(tokens, features.hidden, features.tapped, whole))

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens; beyond the last eight calls, all of the text."""
        self._drafted = None
        while num_tokens and self._before:
            self._record, rows = self._before.pop()
            count = int(to_number((rows.tokens >= 0).sum()))
            if count > num_tokens:
                kept = slice(count - num_tokens)
                taps = tuple(tap[kept] for tap in rows.taps)
                self._accept(Rows(rows.tokens[kept], rows.hidden[kept], taps, True))
            num_tokens -= min(count, num_tokens)
        if num_tokens:
            self._record = self._reader.nothing()

    def _accept(self, rows: Rows) -> None:
        self._before.append((self._record, rows))
        record = self._drafted or self._record
        self._drafted = None
        if record.waiting and record.num_waiting >= MOST_WAITING:
            _, record = self._reader.read(record, rows.tokens[:1])
            mx.async_eval(record.kept)  # else the graph would grow with the text
        self._record = replace(record, waiting=(*record.waiting, rows))
