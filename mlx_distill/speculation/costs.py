"""What decoding costs on a machine: calls of a target by rows and context, drafts by shape.

    rows      1     2     4     8    16          a plain step is a call of one row; a cycle is a
    call_s   1.0   1.1   1.2   1.5   2.9  ms     draft, a call of as many rows as its tree has
                                                 nodes, and an overhead

A call is timed from its start until its result is there. A loop that builds a step while the device
is at the one before takes less: its overhead is then below 0.

``calibration`` measures them; the planner asks what a shape of draft would take.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.limits import is_finite
from mlx_distill.untyped import Fields, Settings

# What further rows cost grows with the context, faster on some machines than on others. Beyond the
# longest context that was measured, it is taken to grow by this much with every doubling at least.
GROWTH = 0.25
# However much runs at the same time, a step takes at least this share of its call.
LEAST = 0.1
# What no measurement has: larger numbers are those of a damaged file.
MOST_THREADS, LARGEST = 4096, 10**9
OVERHEADS = (
    "overhead_s",
    "plain_overhead_s",
    "sampled_overhead_s",
    "sampled_plain_overhead_s",
)
# The same of cycles that draft a line, where these were timed.
LINES = "line_overhead_s", "sampled_line_overhead_s"


@dataclass(frozen=True)
class Costs:
    """Measured times of one target and one drafter, in seconds.

    Args:
        contexts: Lengths of the text at which calls were measured, in tokens; ascending.
        rows: Rows of the calls that were measured; ascending, 1 first.
        call_s: Of a call, for every context and number of rows.
        widths: Beam widths of the drafts that were measured; ascending.
        lengths: Lengths of the drafts that were measured, in tokens; ascending.
        draft_s: Of a draft, for every width and length.
        overhead_s: What a cycle that drafts takes beyond its draft and its call.
        plain_overhead_s: What a step of plain decoding takes beyond its call.
        sampled_overhead_s: As ``overhead_s``, where tokens are drawn and not the likeliest.
        sampled_plain_overhead_s: As ``plain_overhead_s``, where tokens are drawn.
        line_overhead_s: As ``overhead_s``, where a line is drafted: no tree is chosen and walked
            then, and the device is waited for less. None if that was not measured.
        sampled_line_overhead_s: As ``line_overhead_s``, where tokens are drawn.
        cycle_tokens: What a cycle of the default shape added to the text that was measured on;
            0 if that is not known.
        sampled_cycle_tokens: As ``cycle_tokens``, where tokens are drawn.
        threads: Of the matrix products with which this was measured; None without a choice.
        spread: How far measurements of the same lay apart, as a share of them.

    Raises:
        InputError: If the tables do not fit together, or hold what is no time.
    """

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    call_s: tuple[tuple[float, ...], ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    draft_s: tuple[tuple[float, ...], ...]
    overhead_s: float = 0.0
    plain_overhead_s: float = 0.0
    sampled_overhead_s: float = 0.0
    sampled_plain_overhead_s: float = 0.0
    line_overhead_s: float | None = None
    sampled_line_overhead_s: float | None = None
    cycle_tokens: float = 0.0
    sampled_cycle_tokens: float = 0.0
    threads: int | None = None
    spread: float = 0.0

    def __post_init__(self) -> None:
        _check(vars(self))

    @classmethod
    def from_dict(cls, values: Settings) -> "Costs":
        """Return what ``to_dict`` made a dictionary of.

        Raises:
            InputError: If something is missing, unknown or of the wrong kind.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise InputError(f"costs must hold {', '.join(sorted(names))}, and nothing else")
        tables = {name: _tuples(value) for name, value in values.items()}
        _check(tables)
        return cls(**tables)

    def to_dict(self) -> Fields:
        """Return the tables as JSON holds them."""
        return asdict(self)

    def calls(self, rows: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
        """Return the seconds of calls of so many rows each, at one context."""
        return self._between(rows, self._curve(context))

    def plain(self, context: int, batch: int = 1) -> float:
        """Return the seconds of a plain step of so many texts."""
        curve = self._curve(context)  # a planner asks at every step of one text
        call_s = float(curve[0] if batch == 1 else self._between([batch], curve)[0])
        return max(call_s + self.plain_overhead_s, LEAST * call_s)

    def cycle(self, plan: DraftPlan, num_nodes: int, context: int, batch: int = 1) -> float:
        """Return the seconds of a cycle that verifies a tree of so many nodes for every text."""
        rest_s = np.array(self.rest(plan.beam_width, plan.draft_length))
        return float(self.cycles(rest_s, [batch * num_nodes], context)[0])

    def cycles(
        self, rest_s: np.ndarray, rows: Sequence[int] | np.ndarray, context: int
    ) -> np.ndarray:
        """Return the seconds of cycles by what they take beyond their calls, and these calls' rows.

        Args:
            rest_s: As ``rest`` returns it, for any shapes.
            rows: Of the calls.
            context: Tokens before them.
        """
        call_s = self.calls(rows, context)
        return np.maximum(call_s + rest_s[..., None], LEAST * call_s)

    def rest(self, width: int, length: int) -> float:
        """Return the seconds of a cycle's draft and of all else beside its call.

        Below zero it is what is done at the same time: a draft at the most, and of the call what of
        a plain step's is.
        """
        line = width == 1 and self.line_overhead_s is not None
        overhead_s = self.line_overhead_s if line else self.overhead_s
        assert overhead_s is not None
        return max(self.draft(width, length) + overhead_s, min(0.0, self.plain_overhead_s))

    def sampled(self) -> "Costs":
        """Return what decoding costs where tokens are drawn."""
        return replace(
            self,
            overhead_s=self.sampled_overhead_s,
            plain_overhead_s=self.sampled_plain_overhead_s,
            line_overhead_s=self.sampled_line_overhead_s,
            cycle_tokens=self.sampled_cycle_tokens,
        )

    def draft(self, width: int, length: int) -> float:
        """Return the seconds of a draft."""
        by_length = [np.interp(length, self.lengths, row) for row in self.draft_s]
        return float(np.interp(width, self.widths, by_length))

    @cached_property
    def _calls(self) -> np.ndarray:
        return np.array(self.call_s)

    def _curve(self, context: int) -> np.ndarray:
        """Return the seconds of calls of the measured numbers of rows, at any context."""
        last, tables = self.contexts[-1], self._calls
        if context < last:
            place = bisect.bisect_right(self.contexts, context)
            if place == 0:
                return tables[0]
            before, after = self.contexts[place - 1 : place + 1]
            share = (context - before) / (after - before)
            return tables[place - 1] + share * (tables[place] - tables[place - 1])
        # What the rows beyond the first cost is never taken to shrink; the first row's may.
        doublings = math.log2(context / last)
        extra = tables[-1] - tables[-1, 0]
        grown = extra * (1 + GROWTH * doublings)
        first = tables[-1, 0]
        if len(tables) > 1:
            steps = (context - last) / (last - self.contexts[-2])
            before = tables[-2] - tables[-2, 0]
            grown = np.maximum(grown, extra + steps * (extra - before))
            first += steps * max(0.0, first - tables[-2, 0])
        return first + grown

    def _between(self, rows: Sequence[int] | np.ndarray, curve: np.ndarray) -> np.ndarray:
        """Return a curve at other numbers of rows; beyond the last one it goes on as it went."""
        found = np.asarray(np.interp(rows, self.rows, curve))
        if len(self.rows) < 2:
            return found
        slope = (curve[-1] - curve[-2]) / (self.rows[-1] - self.rows[-2])
        return found + max(0.0, slope) * np.maximum(0, np.asarray(rows) - self.rows[-1])


def _check(values: Settings) -> None:
    """Raise InputError unless the tables fit together and hold times."""
    for name in ("contexts", "rows", "widths", "lengths"):
        _check_axis(name, values[name])
    if values["rows"][0] != 1:
        raise InputError("rows must begin with 1, which is a plain step")
    for name, rows, columns in (("call_s", "contexts", "rows"), ("draft_s", "widths", "lengths")):
        _check_table(name, values[name], len(values[rows]), len(values[columns]))
    for name in ("spread", "cycle_tokens", "sampled_cycle_tokens"):
        if not _is_time(values[name]):
            raise InputError(f"{name} must be a number of at least 0, got {values[name]!r}")
    threads = values["threads"]
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise InputError(
            f"threads must be a whole number between 1 and {MOST_THREADS}, got {threads!r:.40}"
        )
    for name in (*OVERHEADS, *LINES):
        if name in LINES and values[name] is None:
            continue
        if not is_finite(values[name]):
            raise InputError(f"{name} must be a number, got {values[name]!r}")
    if not all(time > 0 for row in values["call_s"] for time in row):
        raise InputError("call_s must hold times above 0")


def _is_time(value: object) -> bool:
    return is_finite(value) and value >= 0


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _check_axis(name: str, values: Any) -> None:
    """Raise InputError unless these are ascending whole numbers of at least 1."""
    whole = isinstance(values, tuple) and values and all(type(one) is int for one in values)
    ascending = whole and all(a < b for a, b in itertools.pairwise(values))
    if not ascending or values[0] < 1 or values[-1] > LARGEST:
        raise InputError(f"{name} must be ascending whole numbers of at least 1, got {values!r}")


def _check_table(name: str, table: Any, num_rows: int, num_columns: int) -> None:
    """Raise InputError unless this is a table of times."""
    rows = table if isinstance(table, tuple) else ()
    shaped = all(isinstance(row, tuple) and len(row) == num_columns for row in rows)
    if len(rows) != num_rows or not shaped:
        raise InputError(f"{name} must hold {num_rows} rows of {num_columns} times")
    for time in (time for row in rows for time in row):
        if not _is_time(time):
            raise InputError(f"{name} must hold times of at least 0 seconds, got {time!r}")
