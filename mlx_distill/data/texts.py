"""Texts to learn from, as token ids, and what is learned of them.

Of a document all is learned but its first token; of a chat every answer and what ends it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_distill.data.chats import Chat

CHOICE = ", choice "  # in a place, between its row and the number of one of the row's answers


@dataclass(frozen=True)
class Source:
    """What a text was made of, for those who read it otherwise, and for complaints.

    Args:
        place: The file and the line.
        chat: None for a document.
        templated: A chat template wrote it; its marks belong together, so it is never cut.
        ended: False if it was cut off.
        answers: Of a chat, which message is learned from which token to which; a message that the
            chat has not is the text's own.
        lost: Its other answers were not found, so the last alone is learned.
    """

    place: str
    chat: Chat | None = None
    templated: bool = False
    ended: bool = True
    answers: tuple[tuple[int, int, int], ...] = ()
    lost: bool = False

    @property
    def file(self) -> str:
        """The file alone."""
        return self.row.rpartition(", ")[0]

    @property
    def row(self) -> str:
        """The file and the line, of which this may be one answer of several."""
        return self.place.partition(CHOICE)[0]


@dataclass(frozen=True, init=False)
class Text:
    """One text.

    Args:
        tokens: Its token ids.
        learned: Which of them are learned, that is predicted from those before them; never the
            first, which has none. None for all the others.
        source: What it was made of, where that is known.
    """

    tokens: list[int]
    learned: tuple[bool, ...]
    source: Source | None = field(compare=False)

    def __init__(
        self,
        tokens: list[int],
        learned: Iterable[bool] | None = None,
        source: Source | None = None,
    ) -> None:
        marks = [True] * len(tokens) if learned is None else [bool(one) for one in learned]
        if len(marks) != len(tokens):
            raise ValueError(f"{len(marks)} marks do not fit {len(tokens)} tokens")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "learned", (False, *marks[1:])[: len(tokens)])
        object.__setattr__(self, "source", source)

    @classmethod
    def behind(cls, tokens: list[int], start: int, source: Source | None = None) -> "Text":
        """Return a text of which all is learned but its first ``start`` tokens."""
        return cls(tokens, [place >= start for place in range(len(tokens))], source)

    @property
    def num_learned(self) -> int:
        """Number of learned tokens."""
        return sum(self.learned)

    @property
    def asks(self) -> bool:
        """Whether it is a question alone: nothing of it is learned, and no answer ends it.

        Of a chat whose answers are not to be learned nothing is, either, but it has them.
        """
        chat = self.source.chat if self.source else None
        has_answer = chat is not None and chat.messages[-1].get("role") == "assistant"
        return not self.num_learned and not has_answer

    @property
    def place(self) -> str:
        """Where it comes from, for complaints."""
        return self.source.place if self.source else "a text"

    def upto(self, stop: int) -> "Text":
        """Return the first tokens as a text of its own, which does not end where they do."""
        source = self.source
        if source:
            answers = [
                (m, start, min(end, stop)) for m, start, end in source.answers if start < stop
            ]
            source = replace(source, ended=False, answers=tuple(answers))
        return Text(self.tokens[:stop], self.learned[:stop], source)

    def answers(self) -> list[tuple[int, int]]:
        """Return where learned tokens stand in a row, each from its first to behind its last."""
        edges = np.flatnonzero(np.diff([False, *self.learned, False])).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class TextBatch:
    """Texts of one step, padded on the right.

    Args:
        tokens: Token ids; padding is 0.
        mask: 1 where the token that follows position t is to be learned.
        rows: Which texts they are, of those that are learned; nothing where they are others.
        texts: The texts, for teachers that read them otherwise.
    """

    tokens: mx.array
    mask: mx.array
    rows: list[int]
    texts: Sequence[Text] = ()

    @property
    def inputs(self) -> mx.array:
        """What the networks read, (B, T)."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> mx.array:
        """What follows it, (B, T)."""
        return self.tokens[:, 1:]


def text_batch(
    texts: Sequence[Text], rows: Iterable[int], multiple: int = 32, limit: int | None = None
) -> TextBatch:
    """Return some of the texts as a batch, padded to a multiple of so many inputs.

    Args:
        texts: All of them.
        rows: Which ones.
        multiple: Of inputs, so that few shapes occur.
        limit: Positions that the networks have; nothing is padded beyond them.
    """
    rows = [int(row) for row in rows]
    longest = max(len(texts[row].tokens) for row in rows) - 1
    width = -(-longest // multiple) * multiple + 1
    width = width if limit is None else max(longest + 1, min(width, limit + 1))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width - 1), np.float32)
    for place, row in enumerate(rows):
        text = texts[row]
        tokens[place, : len(text.tokens)] = text.tokens
        mask[place, : len(text.tokens) - 1] = text.learned[1:]
    return TextBatch(mx.array(tokens), mx.array(mask), rows, [texts[row] for row in rows])
