"""What became of the rows of the data: how many were kept, how many dropped, where and why."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PLACES_SHOWN = 3
LOST = "only the last answer learned, for the others were not found"


class Drop(Exception):
    """A row is not used; the text is the reason, the same for all rows of a kind."""


@dataclass
class Report:
    """What was read, kept and dropped.

    Args:
        rows: What was read.
        kept: What is used; a row with several choices has several.
        dropped: Rows or choices that were not kept, by reason.
        changed: Those that were kept, but not as they are, by what was done.
        places: Where the first of them stand, by reason.
        noun: What they are, for people.
    """

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    noun: str = "texts"

    @contextmanager
    def counting(self, place: str) -> Iterator[None]:
        """Count a Drop and end it here."""
        try:
            yield
        except Drop as drop:
            self.drop(str(drop), place)

    def drop(self, reason: str, place: str) -> None:
        """Count what is not used."""
        self._count(self.dropped, reason, place)

    def change(self, what: str, place: str) -> None:
        """Count what is used otherwise than it stands there."""
        self._count(self.changed, what, place)

    def unchange(self, what: str, place: str) -> None:
        """Take a count of ``change`` back: what was kept is not used after all, or elsewhere."""
        self.changed[what] -= 1
        if place in self.places[what]:
            self.places[what].remove(place)
        if not self.changed[what]:
            del self.changed[what], self.places[what]

    def _count(self, counts: Counter[str], reason: str, place: str) -> None:
        counts[reason] += 1
        if counts[reason] <= PLACES_SHOWN:
            self.places.setdefault(reason, []).append(place)

    def add(self, other: "Report") -> None:
        """Count what another report has counted, too."""
        self.rows += other.rows
        self.kept += other.kept
        self.dropped += other.dropped
        self.changed += other.changed
        for reason, places in other.places.items():
            known = self.places.setdefault(reason, [])
            known += places[: PLACES_SHOWN - len(known)]

    def reasons(self) -> str:
        """Return why what was dropped was dropped, in one line."""
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())

    def lines(self) -> list[str]:
        """Return the report as text, the most frequent reason first."""
        first = (
            f"{self.rows} rows read, {self.kept} {self.noun} kept, {self.dropped.total()} dropped"
        )
        return [first, *map(self._line, self._counts())]

    def sentence(self) -> str:
        """Return the report as one sentence, for a model card."""
        counts = "; ".join(f"{count} {reason}" for reason, count in self._counts())
        return f"{self.kept:,} {self.noun} of {self.rows:,} rows" + (
            f" ({counts})" if counts else ""
        )

    def _counts(self) -> list[tuple[str, int]]:
        return [*self.dropped.most_common(), *self.changed.most_common()]

    def _line(self, counted: tuple[str, int]) -> str:
        reason, count = counted
        places = self.places[reason]
        more = ["..."] if count > len(places) else []
        return f"{count} {reason}: {'; '.join([*places, *more])}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        every = {
            name: {
                reason: {"count": count, "places": self.places[reason]}
                for reason, count in counts.most_common()
            }
            for name, counts in (("dropped", self.dropped), ("changed", self.changed))
        }
        return {"rows": self.rows, "kept": self.kept, **every}
