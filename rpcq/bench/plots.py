"""Plots of a report, as SVG in the text of a page. Pure.

What is at a place of a plot stands in a `<title>`, which browsers show where the pointer rests.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from rpcq.bench.outputs import (
    number_text,
    time_text,
)
from rpcq.bench.result import Distribution, Second

WIDTH: Final = 560
HEIGHT: Final = 290
LEFT: Final = 84
RIGHT: Final = 20
TOP: Final = 12
BOTTOM: Final = 38
"""A plot's size and margins, in its own units; the margins hold labels of the size that phones need."""

CHUNKS: Final = 280
"""Points of a line at most; what has more is drawn in so many parts, each at its greatest or as its whole range."""

DECADES: Final = 1.3
"""Powers of ten between the least and the greatest value, from which on an axis of times is logarithmic."""

Point = tuple[float, float | None]


# Axes


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a plot.

    Attributes:
        low: the value at its beginning.
        high: the value at its end.
        marks: where they are, and what they say.
        say: a value for people.
        log: whether it is logarithmic.
        minor: the marks that have no room on phones, by their place in `marks`.

    """

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    say: Callable[[float], str]
    log: bool = False
    minor: frozenset[int] = frozenset()

    def place(self, value: float) -> float:
        """From 0 at its beginning to 1 at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot.

    Attributes:
        name: what the legend says; empty for what it does not name.
        style: the class that draws it.
        points: with gaps where y is None.
        range: where there are too many points, each part is drawn as its median, in a band from its least to its
            greatest; else at its greatest.

    """

    name: str
    style: str
    points: Sequence[Point]
    range: bool = False


def _values(lines: Sequence[Line]) -> list[float]:
    return [y for line in lines for _, y in line.points if y is not None]


def linear_axis(
    values: Sequence[float], text: Callable[[float], str], say: Callable[[float], str], least: float
) -> Axis:
    """From 0 on, with up to six marks at round values, `least` apart or more."""
    high = max(values, default=0.0) or 1.0
    step = max(least, _round_step(high / 5))
    count = max(1, math.ceil(high / step - 1e-9))
    return Axis(0.0, count * step, tuple((at * step, text(at * step)) for at in range(count + 1)), say)


def _round_step(least: float) -> float:
    ten = 10.0 ** math.floor(math.log10(least))
    return next(step * ten for step in (1, 2, 5, 10) if step * ten >= least * (1 - 1e-9))


def count_axis(lines: Sequence[Line]) -> Axis:
    """Of whole numbers."""
    values = _values(lines)
    return linear_axis(values, short_texts(values), number_text, 1.0)


def time_axis(lines: Sequence[Line]) -> Axis:
    """Of milliseconds: logarithmic where they span much."""
    values = _values(lines)
    some = [value for value in values if value > 0]
    if some and math.log10(max(some) / min(some)) >= DECADES:
        low, high = _round_down(min(some)), _round_step(max(some))
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [10.0**power for power in powers if low <= 10.0**power * 1.000001 and 10.0**power <= high * 1.000001]
        if len(marks) < 3:
            marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            marks = [mark for mark in marks if low <= mark * 1.000001 and mark <= high * 1.000001]
        return Axis(low, high, tuple((mark, time_text(mark)) for mark in marks), time_text, log=True)
    high = max(some, default=1.0)
    unit, size = ("s", 1000.0) if high >= 1000 else ("ms", 1.0) if high >= 1 else ("µs", 0.001)
    return linear_axis(values or [1.0], lambda value: f"{value / size:g} {unit}" if value else "0", time_text, 0.0)


def _round_down(value: float) -> float:
    ten = 10.0 ** math.floor(math.log10(value))
    return next(step * ten for step in (5, 2, 1) if step * ten <= value * (1 + 1e-9))


def second_axis(series: Sequence[Second]) -> Axis:
    """Of the time of a run; in minutes where that is long."""
    low, high = float(series[0].at), series[-1].at + 1.0
    long = high - low > 180
    size, unit = (60.0, "min") if long else (1.0, "s")
    step = max(1.0, _round_step((high - low) / size / 6)) * size
    marks = [low + at * step for at in range(int((high - low) / step + 1e-9) + 1)]
    minor = frozenset(range(1, len(marks), 2)) if len(marks) > 5 else frozenset[int]()
    texts = tuple((mark, f"{mark / size:g} {unit}") for mark in marks)
    return Axis(low, high, texts, lambda value: f"{int(value):,} s", minor=minor)


def percentile_axis(count: int) -> Axis:
    """Of log10(1 / (1 - share)): each unit is ten times rarer, up to one call of all."""
    high = max(1.0, math.log10(count) if count else 1.0)
    marks = [(0.0, "0"), (math.log10(2), "50")]
    marks += [(float(nines), f"{100 - 10 ** (2 - nines):.10g}") for nines in range(1, int(high + 1e-9) + 1)]
    minor = {1} if high > 3 else set()
    if high > 6:
        minor |= set(range(3, len(marks), 2))
    return Axis(0.0, high, tuple(marks), lambda value: f"{100 - 10 ** (2 - value):.6g}%", minor=frozenset(minor))


def curve(distribution: Distribution) -> list[Point]:
    """Milliseconds by log10(1 / (1 - share))."""
    count = distribution.count
    if not count:
        return []
    values, counts, total = [], [], 0
    for it in distribution.histogram().get_recorded_iterator():
        total += it.count_added_in_this_iter_step
        values.append(it.value_iterated_to / 1000)
        counts.append(total)
    high = max(1.0, math.log10(count))
    places = [high * at / (CHUNKS - 1) for at in range(CHUNKS)]
    found = [(x, values[min(bisect_left(counts, count * (1 - 10**-x)), len(values) - 1)]) for x in places[:-1]]
    return [*found, (high, distribution.max)]


def short_texts(values: Sequence[float]) -> Callable[[float], str]:
    """Numbers as an axis of these has them, all in the same unit."""
    high = max(values, default=0.0)
    size, unit = (1e6, "M") if high >= 2e6 else (1e3, "k") if high >= 1e4 else (1.0, "")
    return lambda value: f"{value / size:,.10g}{unit if value else ''}"


# Plots


def figure(head: str, about: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """A plot with its head, its caption, and a key where it has several lines."""
    named = [line for line in lines if line.name]
    key = ""
    if len(named) > 1:
        key = "".join(f"<li>{_sample(line.style)}{escape(line.name)}</li>" for line in reversed(named))
        key = f'<ul class="key">{key}</ul>'
    scale = " Log scale." if y.log else ""
    return (
        f"<figure><figcaption><h3>{head}</h3>{key}<p>{about}{scale}</p></figcaption>{_plot(head, x, y, lines)}</figure>"
    )


def _sample(style: str) -> str:
    return f'<svg viewBox="0 0 32 12" aria-hidden="true"><path class="{style}" d="M3 6H29"/></svg>'


def _plot(head: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    wide, tall = right - LEFT, bottom - TOP

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + wide * x.place(point[0]), bottom - tall * y.place(point[1])

    drawn = []
    for value, text in y.marks:
        _, at = place((x.low, value))
        drawn.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        drawn.append(f'<text class="y" x="{LEFT - 9}" y="{at:.1f}" dy=".35em">{text}</text>')
    for number, (value, text) in enumerate(x.marks):
        at, _ = place((value, y.low))
        minor = " minor" if number in x.minor else ""
        drawn.append(f'<path class="axis" d="M{at:.1f} {bottom}v5"/>')
        kind, at = ("y", at + RIGHT) if at > right - RIGHT else ("x", at)  # the last one ends where the plot does
        drawn.append(f'<text class="{kind}{minor}" x="{at:.1f}" y="{HEIGHT - 9}">{text}</text>')
    drawn.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    if not _values(lines):
        drawn.append(f'<text class="x" x="{LEFT + wide / 2:.1f}" y="{TOP + tall / 2:.1f}">no calls ended</text>')
    for line in lines:
        if line.style == "bars":
            drawn.append(_bars(line, place, bottom))
        else:
            drawn.append(_path(line, place))
    drawn += _tips(lines, x, y, place)
    said = escape(f"{head}: {_said(lines, y)}.")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(drawn)}</svg>'


Place = Callable[[tuple[float, float]], tuple[float, float]]


def _path(line: Line, place: Place) -> str:
    """A line through the points that there are; one that has no neighbour, and each of a few, is a dot."""
    pieces = _pieces(thin(line.points, statistics.median if line.range else max), place)
    drawn = ["M" + _through(piece) for piece in pieces if len(piece) > 1]
    dots = [point for piece in pieces if len(piece) == 1 or len(line.points) <= 12 for point in piece]
    path = f'<path class="{line.style}" d="{"".join(drawn)}"/>' if drawn else ""
    path += "".join(f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in dots)
    if line.range and line.style == "a" and len(line.points) > CHUNKS:
        bands = zip(*(_pieces(thin(line.points, how), place) for how in (min, max)), strict=True)
        band = "".join(f"M{_through(low)}L{_through(high[::-1])}Z" for low, high in bands if low)
        path = f'<path class="band" d="{band}"/>{path}'
    return path


def _pieces(points: Sequence[Point], place: Place) -> list[list[tuple[float, float]]]:
    """Where the points are, in pieces between the gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(place((x, y)))
    return pieces


def _through(piece: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in piece)


def _bars(line: Line, place: Place, bottom: float) -> str:
    points = [place((x, y)) for x, y in thin(line.points) if y]
    wide = max(1.5, min(8.0, 0.7 * (WIDTH - LEFT - RIGHT) / len(line.points)))
    drawn = "".join(f"M{x:.1f} {bottom}V{min(y, bottom - 1.5):.1f}" for x, y in points)
    return f'<path class="bars" stroke-width="{wide:.1f}" d="{drawn}"/>'


def thin(points: Sequence[Point], how: Callable[[list[float]], float] = max) -> list[Point]:
    """No more points than can be told apart: each part of many is one, a gap where it has no value."""
    if len(points) <= CHUNKS:
        return list(points)
    size = math.ceil(len(points) / CHUNKS)
    kept: list[Point] = []
    for at in range(0, len(points), size):
        chunk = points[at : at + size]
        values = [y for _, y in chunk if y is not None]
        kept.append((chunk[len(chunk) // 2][0], how(values) if values else None))
    return kept


def _tips(lines: Sequence[Line], x: Axis, y: Axis, place: Place) -> Iterator[str]:
    """What the lines say at each place: shown where the pointer rests."""
    named = [line for line in lines if line.name and line.points]
    if not named:
        return
    longest = named[-1].points
    size = math.ceil(len(longest) / 100)
    for at in range(0, len(longest), size):
        first, last = longest[at][0], longest[min(at + size, len(longest)) - 1][0]
        begins = (longest[at - 1][0] + first) / 2 if at else x.low
        ends = (last + longest[at + size][0]) / 2 if at + size < len(longest) else x.high
        (left, _), (right, _) = place((begins, y.low)), place((ends, y.low))
        where = x.say(first) if first == last else f"{x.say(first)} to {x.say(last)}"
        said = [
            f"{line.name} {_range([v for _, v in line.points[at : at + size] if v is not None], y)}"
            for line in reversed(named)
        ]
        yield (
            f'<rect class="tip" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(where)}: {escape(', '.join(said))}</title></rect>"
        )


def _range(values: Sequence[float], axis: Axis) -> str:
    if not values:
        return "none"
    low, high = axis.say(min(values)), axis.say(max(values))
    return low if low == high else f"{low} to {high}"


def _said(lines: Sequence[Line], y: Axis) -> str:
    """A plot in words, for those who do not see it."""
    return ", ".join(f"{line.name} {_range(_values([line]), y)}" for line in reversed(lines) if line.name)
