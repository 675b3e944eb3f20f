"""Texts that can be asked where they had the last tokens of another, and what followed there.

    text    the cat sat on the mat . the cat        place   behind the first "cat", 2 tokens match
                   ^ place

Places are found by their last two tokens: a dictionary has the newest place of every pair, and
every place has the one before it of the same pair, as compressors of texts do it. So a text takes
a few numbers per token, and the last token can be taken away again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PAIR = 2  # tokens; what followed a single one would be chance
MOST_PLACES = 32  # of one text that are looked at, the newest first
MOST_TEXTS = 64  # that a store holds
NO_PLACE = 0


@dataclass(frozen=True)
class Match:
    """A place where a text has what another one ends with.

    Args:
        text: What was found.
        place: How many of its tokens come before what follows.
        length: How many tokens match, up to the most that are told apart.
        own: Whether it is the very text that ends so.
    """

    text: "Text"
    place: int
    length: int
    own: bool

    def following(self, count: int) -> list[int]:
        """Return so many tokens that followed; at its end, a text goes on as from the place on.

        So one that repeats itself is taken to do so for good.
        """
        tokens, place = self.text.tokens, self.place
        found = tokens[place : place + count]
        if self.own and found:
            found = (found * (count // len(found) + 1))[:count]
        return found


class Text:
    """Tokens, and where each pair of them stands."""

    def __init__(self, tokens: Sequence[int] = ()):
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}
        self._before: list[int] = []
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Put a token behind the text."""
        before = NO_PLACE
        if self.tokens:
            pair = self.tokens[-1], token
            before = self._newest.get(pair, NO_PLACE)
            self._newest[pair] = len(self.tokens) + 1
        self.tokens.append(token)
        self._before.append(before)

    def pop(self) -> None:
        """Take the last token away."""
        token, before = self.tokens.pop(), self._before.pop()
        if not self.tokens:
            return
        pair = self.tokens[-1], token
        if before:
            self._newest[pair] = before
        else:
            del self._newest[pair]

    def has_end_of(self, other: "Text") -> bool:
        """Return whether the last pair of another text stands here."""
        return tuple(other.tokens[-PAIR:]) in self._newest

    def matches(self, other: "Text", longest: int) -> Iterator[Match]:
        """Yield the places of what another text ends with, the newest first.

        Args:
            other: The text that ends; where it is this one, its end is not among the places.
            longest: Longer matches are not told apart.
        """
        ending, own = other.tokens, other is self
        if len(ending) < PAIR:
            return
        place = self._before[-1] if own else self._newest.get((ending[-2], ending[-1]), NO_PLACE)
        for _ in range(MOST_PLACES):
            if place == NO_PLACE:
                return
            yield Match(self, place, self._length(place, ending, longest), own)
            place = self._before[place - 1]

    def _length(self, place: int, ending: list[int], longest: int) -> int:
        """Return how many tokens before a place are those that a text ends with."""
        tokens, length = self.tokens, PAIR
        most = min(longest, place, len(ending))
        while length < most and tokens[place - 1 - length] == ending[-1 - length]:
            length += 1
        return length


class Store:
    """The latest texts, so many tokens at most.

    Args:
        num_tokens: What all of them may have together; a text that has more leaves its end.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.texts: deque[Text] = deque()
        self._size = 0

    def __len__(self) -> int:
        """The number of tokens that are stored."""
        return self._size

    def having(self, ending: Text) -> Iterator[Text]:
        """Yield the texts that have what another one ends with, the latest first."""
        texts = reversed(tuple(self.texts))  # another thread's text may end meanwhile
        return (text for text in texts if text.has_end_of(ending))

    def add(self, text: Text) -> None:
        """Store a text that has ended; the oldest ones make room."""
        if len(text.tokens) > self.num_tokens:
            text = Text(text.tokens[len(text.tokens) - self.num_tokens :])
        if len(text.tokens) <= PAIR:
            return
        self.texts.append(text)
        self._size += len(text.tokens)
        while self._size > self.num_tokens or len(self.texts) > MOST_TEXTS:
            self._size -= len(self.texts.popleft().tokens)
