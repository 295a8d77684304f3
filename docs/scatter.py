"""Draws points of two times against each other as SVG: both axes logarithmic, the diagonal, and bands about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 600
LEFT, TOP, SIDE = 100, 16, 440
"""The square that is plotted, in pixels."""
COLUMNS, LINE = 2, 20
"""Of the legend: entries beside each other, pixels from one to the next."""
INSET = 30
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333", "#8c564b")
"""Told apart by people who see few colours, too (Okabe and Ito)."""
BANDS = ((0.35, "#eeeeee"), (0.15, "#d6d6d6"))
UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "us"))


@dataclass(frozen=True)
class Point:
    """A measured time and the one that was predicted, in microseconds; hollow where that is from no measurement."""

    series: str
    measured: float
    predicted: float
    hollow: bool
    title: str


def scatter(points: Sequence[Point]) -> str:
    """The picture. The axes have one range, so that the diagonal is where prediction and measurement agree."""
    series = list(dict.fromkeys(point.series for point in points))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(series)}
    axis = _Axis.around([time for point in points for time in (point.measured, point.predicted)])
    legend = [*_entries(series, colours)]
    height = TOP + SIDE + 62 + LINE * -(-len(legend) // COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<clipPath id="square"><rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/></clipPath>',
        *axis.bands(),
        *axis.ticks(),
        *(_marker(axis.x(p.measured), axis.y(p.predicted), colours[p.series], p.hollow, p.title) for p in points),
        f'<text x="{LEFT + SIDE / 2}" y="{TOP + SIDE + 38}" text-anchor="middle">measured, a whole step</text>',
        f'<text transform="translate(24 {TOP + SIDE / 2}) rotate(-90)" text-anchor="middle">predicted</text>',
    ]
    for number, entry in enumerate(legend):
        column, line = number % COLUMNS, number // COLUMNS
        x, y = INSET + column * (WIDTH - INSET) / COLUMNS, TOP + SIDE + 64 + line * LINE
        parts.append(f'<g transform="translate({x:.0f} {y})">{entry}</g>')
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Axis:
    """A range of times, as powers of ten."""

    low: float
    high: float

    @staticmethod
    def around(times: Sequence[float]) -> _Axis:
        """Somewhat more than the times take."""
        logs = [math.log10(time) for time in times]
        margin = 0.05 * (max(logs) - min(logs)) + 0.15
        return _Axis(min(logs) - margin, max(logs) + margin)

    def x(self, time: float) -> float:
        return LEFT + self._share(time) * SIDE

    def y(self, time: float) -> float:
        return TOP + SIDE - self._share(time) * SIDE

    def _share(self, time: float) -> float:
        return (math.log10(time) - self.low) / (self.high - self.low)

    def bands(self) -> Iterator[str]:
        """Where a prediction is off by no more than so much, and where it is right."""
        first, last = 10**self.low, 10**self.high
        for off, colour in BANDS:
            corners = ((first, 1 - off), (first, 1 + off), (last, 1 + off), (last, 1 - off))
            points = " ".join(f"{self.x(time):.1f},{self.y(time * factor):.1f}" for time, factor in corners)
            yield f'<polygon points="{points}" fill="{colour}" clip-path="url(#square)"/>'
        ends = f'x1="{LEFT}" y1="{TOP + SIDE}" x2="{LEFT + SIDE}" y2="{TOP}"'
        yield f'<line {ends} stroke="#888888" stroke-dasharray="5 4"/>'

    def ticks(self) -> Iterator[str]:
        """Lines at 1, 2 and 5 of each decade where there are few, else at each decade; the frame above them."""
        steps = (1, 2, 5) if self.high - self.low < 2.2 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high))
        for time in (step * 10.0**decade for decade in decades for step in steps):
            if self.low <= math.log10(time) <= self.high:
                x, y = self.x(time), self.y(time)
                yield f'<path d="M{x:.1f} {TOP}v{SIDE}M{LEFT} {y:.1f}h{SIDE}" stroke="#000000" stroke-opacity="0.08"/>'
                yield f'<text x="{x:.1f}" y="{TOP + SIDE + 18}" text-anchor="middle">{_time(time)}</text>'
                yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_time(time)}</text>'
        yield f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888888"/>'


def _entries(series: Sequence[str], colours: dict[str, str]) -> Iterator[str]:
    """The legend: each series, what the two kinds of marker mean, and the bands."""
    for name in series:
        yield _marker(0, -4, colours[name], False) + _label(name)
    yield _marker(0, -4, "#222222", False) + _label("predicted from measured kernels")
    yield _marker(0, -4, "#222222", True) + _label("predicted from what kernels declare")
    for off, colour in reversed(BANDS):
        yield f'<rect x="-7" y="-11" width="14" height="12" fill="{colour}"/>' + _label(f"off by up to {off:.0%}")


def _label(text: str) -> str:
    return f'<text x="14">{escape(text)}</text>'


def _marker(x: float, y: float, colour: str, hollow: bool, title: str = "") -> str:
    fill = "#ffffff" if hollow else colour
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.8">{told}</circle>'
    )


def _time(us: float) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if us >= 0.999 * size), UNITS[-1])
    return f"{us / size:g} {unit}"
