"""Figures as SVG that lies in a page: lines over an axis, and a heat map.

The colours are classes that the page's style sheet fills, so a figure is right on light and on dark
paper. Every text is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 14, 44
COLOURS = 6
Number = int | float


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Args:
        name: For the legend.
        points: (x, y), in the order of x.
    """

    name: str
    points: Sequence[tuple[Number, Number]]


@dataclass(frozen=True)
class Axis:
    """One axis of a figure.

    Args:
        label: What it counts, with its unit.
        low: Its first value.
        high: Its last value.
        log: Whether a doubling takes the same room everywhere.
        ticks: Where it is labelled; None where it is round.
    """

    label: str
    low: Number
    high: Number
    log: bool = False
    ticks: tuple[Number, ...] | None = None

    @classmethod
    def over(cls, label: str, values: Sequence[Number], *, log: bool = False) -> "Axis":
        """Return the axis of some values, labelled at each of them where they are few."""
        known = sorted(set(values))
        few = tuple(known) if len(known) <= 7 else None
        low, high = known[0], known[-1]
        return cls(label, low, high if high > low else low + 1, log, few)

    @classmethod
    def from_zero(cls, label: str, values: Sequence[Number]) -> "Axis":
        """Return an axis that begins at 0 and has room above the highest value."""
        return cls(label, 0, 1.06 * max([*values, 1e-9]))

    def share(self, value: Number) -> Number:
        """Return how far along the axis a value lies, 0 to 1."""
        place = math.log if self.log else float
        low, high = place(self.low), place(self.high)
        return (place(value) - low) / (high - low)

    def places(self) -> Sequence[Number]:
        """Return where the axis is labelled."""
        if self.ticks is not None:
            return self.ticks
        step = round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, int(self.high / step + 1e-9) + 1)]


def round_step(rough: Number) -> Number:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is not below a step."""
    power = 10 ** math.floor(math.log10(rough))
    return next((n * power for n in (1, 2, 2.5, 5) if n * power >= rough * (1 - 1e-9)), 10 * power)


def number(value: Number) -> str:
    """Return a number as an axis shows it."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def lines(series: Sequence[Line], x: Axis, y: Axis, reference: Number | None = None) -> str:
    """Return a figure of lines with a legend; ``reference`` is a level that is marked."""
    parts = [*_grid(x, y)]
    if reference is not None and y.low <= reference <= y.high:
        level = _y(y, reference)
        parts.append(_segment("reference", LEFT, level, WIDTH - RIGHT, level))
    for place, one in enumerate(series):
        points = [(_x(x, a), _y(y, b)) for a, b in one.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line c{place % COLOURS}" points="{path}"/>')
        for (a, b), (at, value) in zip(points, one.points, strict=True):
            told = escape(f"{one.name}: {number(value)} at {number(at)}")
            dot = f'<circle class="dot c{place % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
            parts.append(f"{dot}<title>{told}</title></circle>")
    svg = _svg(f"{y.label} against {x.label}", parts, HEIGHT)
    return svg + legend([one.name for one in series])


def legend(names: Sequence[str]) -> str:
    """Return the names beside their colours; one line alone needs none."""
    if len(names) < 2:
        return ""
    entries = (
        f'<li><span class="swatch c{place % COLOURS}"></span>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number | None]],
    row_label: str,
    column_label: str,
) -> str:
    """Return a table of ratios as a figure: above 1 in one colour, below 1 in another."""
    known = [abs(math.log(v)) for row in values for v in row if v]
    deepest = max([*known, 0.05])
    top, left = TOP + 18, LEFT + 8
    wide, high = (WIDTH - left - RIGHT) / max(1, len(columns)), 34
    parts = [
        _text("tick", left + wide * (n + 0.5), top - 5, name) for n, name in enumerate(columns)
    ]
    for n, name in enumerate(rows):
        parts.append(_text("tick end", left - 6, top + high * (n + 0.5) + 4, name))
        for m, value in enumerate(values[n]):
            if not value:
                continue
            kind = "warm" if value < 1 else "cool"
            depth = 0.12 + 0.73 * abs(math.log(value)) / deepest
            box = f'x="{left + m * wide + 1:.1f}" y="{top + n * high + 1:.1f}"'
            size = f'width="{wide - 2:.1f}" height="{high - 2}" rx="3"'
            parts.append(f'<rect class="{kind}" {box} {size} fill-opacity="{depth:.2f}"/>')
            deep = "cell deep" if depth > 0.55 else "cell"
            place = (left + wide * (m + 0.5), top + high * (n + 0.5) + 4)
            parts.append(_text(deep, *place, f"{value:.2f}"))
    bottom = top + high * len(rows)
    parts.append(_text("label", (left + WIDTH - RIGHT) / 2, bottom + 20, column_label))
    parts.append(_upright(row_label, (top + bottom) / 2))
    return _svg(f"{row_label} against {column_label}", parts, bottom + 30)


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.places():
        level = _y(y, value)
        parts.append(_segment("grid", LEFT, level, WIDTH - RIGHT, level))
        parts.append(_text("tick end", LEFT - 6, level + 4, number(value)))
    base, last = HEIGHT - BOTTOM, -math.inf
    for value in x.places():
        place, half = _x(x, value), 3.6 * len(number(value))
        parts.append(_segment("mark", place, base, place, base + 4))
        if place - half > last:  # labels that would lie upon each other are left out
            parts.append(_text("tick", place, base + 17, number(value)))
            last = place + half + 2
    parts.append(_segment("base", LEFT, base, WIDTH - RIGHT, base))
    parts.append(_text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label))
    parts.append(_upright(y.label, (TOP + base) / 2))
    return parts


def _x(axis: Axis, value: Number) -> Number:
    return LEFT + axis.share(value) * (WIDTH - RIGHT - LEFT)


def _y(axis: Axis, value: Number) -> Number:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - BOTTOM - TOP)


def _segment(kind: str, x1: Number, y1: Number, x2: Number, y2: Number) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: Number, y: Number, words: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _upright(words: str, middle: Number) -> str:
    turned = f'transform="rotate(-90 12 {middle:.1f})"'
    return f'<text class="label" x="12" y="{middle:.1f}" {turned}>{escape(words)}</text>'


def _svg(title: str, parts: Sequence[str], height: Number) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    return f'<svg class="chart" {box}><title>{escape(title)}</title>{"".join(parts)}</svg>'
