"""What became of the rows of a file: how many were kept, how many dropped, where and why."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PLACES_SHOWN = 3


class Drop(Exception):
    """A row is not used; the text is the reason, the same for all rows of a kind."""


@dataclass
class Report:
    """What was read, kept and dropped.

    Args:
        rows: Lines of the file.
        kept: Completions; a row with several choices has several.
        dropped: Rows or choices that were not kept, by reason.
        places: Where the first of them stand, by reason.
    """

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def counting(self, place: str) -> Iterator[None]:
        """Count a Drop and end it here."""
        try:
            yield
        except Drop as drop:
            reason = str(drop)
            self.dropped[reason] += 1
            if self.dropped[reason] <= PLACES_SHOWN:
                self.places.setdefault(reason, []).append(place)

    def lines(self) -> list[str]:
        """Return the report as text, the most frequent reason first."""
        total = sum(self.dropped.values())
        return [
            f"{self.rows} rows read, {self.kept} completions kept, {total} dropped",
            *(
                f"{count} {reason}: {'; '.join(self.places[reason])}"
                + ("; ..." if count > PLACES_SHOWN else "")
                for reason, count in self.dropped.most_common()
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        dropped = {
            reason: {"count": count, "places": self.places[reason]}
            for reason, count in self.dropped.most_common()
        }
        return {"rows": self.rows, "kept": self.kept, "dropped": dropped}
