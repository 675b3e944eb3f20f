"""Ends a text where a stop text begins."""

from collections.abc import Sequence


class StopCutter:
    """Cuts a text that comes in pieces before the first of some stop texts.

    What could be the beginning of a stop text is held back until it is known not to be.

    Args:
        stop: The texts that end it.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.stopped = False
        self._held = ""

    def feed(self, piece: str, last: bool = False) -> str:
        """Return what can be handed out after one more piece; after the last one, everything."""
        if not self.stop:
            return piece
        text = self._held + piece
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, end) for end in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
