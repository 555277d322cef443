"""The plots of a report, as SVG for a page of HTML. Pure.

The values at each place are in a `<title>`, which browsers show where the pointer rests.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from markupsafe import Markup

from rpcq.bench.outputs import number_text, time_text
from rpcq.bench.rendering import render
from rpcq.bench.result import Distribution, Second


class _Box(NamedTuple):
    """Size and margins of a plot, in units of its own."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


BOX: Final = _Box(width=560, height=290, left=84, right=20, top=12, bottom=38)
"""The margins have room for labels that can be read on a phone."""

CHUNKS: Final = 280
"""Most points of a line. A longer line is drawn in that many parts, each at its maximum or as its range."""

DECADES: Final = 1.3
"""Powers of ten. If times span at least this, from least to greatest, their axis is logarithmic."""

Point = tuple[float, float | None]


# Axes


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a plot.

    Attributes:
        low: the value at its beginning.
        high: the value at its end.
        marks: values that are marked, and the text of each mark.
        say: returns the text of a value.
        log: whether the axis is logarithmic.
        minor: indexes of the marks that are hidden on phones.

    """

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    say: Callable[[float], str]
    log: bool = False
    minor: frozenset[int] = frozenset()

    def place(self, value: float) -> float:
        """Where the value is on the axis: 0 is the beginning, 1 is the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot.

    Attributes:
        name: name in the legend; empty for a line that the legend leaves out.
        style: CSS class of the line.
        points: points of the line; y is None where it has a gap.
        range: how to draw a line with too many points: each part at its median, in a band from its least to its
            greatest value; if False, at its greatest value.

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
    """An axis from 0 on, with up to six marks at round values, which are at least `least` apart."""
    high = max(values, default=0.0) or 1.0
    step = max(least, _round_step(high / 5))
    count = max(1, math.ceil(high / step - 1e-9))
    return Axis(0.0, count * step, tuple((at * step, text(at * step)) for at in range(count + 1)), say)


def _round_step(least: float) -> float:
    ten = 10.0 ** math.floor(math.log10(least))
    return next(step * ten for step in (1, 2, 5, 10) if step * ten >= least * (1 - 1e-9))


def count_axis(lines: Sequence[Line]) -> Axis:
    """An axis of whole numbers."""
    values = _values(lines)
    return linear_axis(values, short_texts(values), number_text, 1.0)


def time_axis(lines: Sequence[Line]) -> Axis:
    """An axis of milliseconds; logarithmic if they span more than `DECADES`."""
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
    """An axis of the time of a run, in seconds; in minutes for a long run."""
    return span_axis(float(series[0].at), series[-1].at + 1.0)


def span_axis(low: float, high: float) -> Axis:
    """An axis of seconds from `low` to `high`; in minutes for a long time."""
    long = high - low > 180
    size, unit = (60.0, "min") if long else (1.0, "s")
    step = max(1.0, _round_step((high - low) / size / 6)) * size
    marks = [low + at * step for at in range(int((high - low) / step + 1e-9) + 1)]
    minor = frozenset(range(1, len(marks), 2)) if len(marks) > 5 else frozenset[int]()
    texts = tuple((mark, f"{mark / size:g} {unit}") for mark in marks)
    return Axis(low, high, texts, lambda value: f"{int(value):,} s", minor=minor)


def percentile_axis(count: int) -> Axis:
    """An axis of log10(1 / (1 - share)): each unit is ten times rarer, up to one call of `count`."""
    high = max(1.0, math.log10(count) if count else 1.0)
    marks = [(0.0, "0"), (math.log10(2), "50")]
    marks += [(float(nines), f"{100 - 10 ** (2 - nines):.10g}") for nines in range(1, int(high + 1e-9) + 1)]
    minor = {1} if high > 3 else set()
    if high > 6:
        minor |= set(range(3, len(marks), 2))
    return Axis(0.0, high, tuple(marks), lambda value: f"{100 - 10 ** (2 - value):.6g}%", minor=frozenset(minor))


def curve(distribution: Distribution) -> list[Point]:
    """Milliseconds by log10(1 / (1 - share)), for `percentile_axis`."""
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
    """A function that writes numbers for an axis of these values, all in the same unit."""
    high = max(values, default=0.0)
    size, unit = (1e6, "M") if high >= 2e6 else (1e3, "k") if high >= 1e4 else (1.0, "")
    return lambda value: f"{value / size:,.10g}{unit if value else ''}"


# Plots


class _Mark(NamedTuple):
    """A mark of the horizontal axis; its text may be beside it."""

    at: float
    text: str
    text_at: float
    style: str


class _Shape(NamedTuple):
    """What is drawn for a line: a path, dots, or both."""

    style: str
    path: str
    dots: Sequence[tuple[float, float]] = ()
    width: float | None = None


class _Tip(NamedTuple):
    """A text that is shown where the pointer rests."""

    left: float
    width: float
    text: str


Place = Callable[[tuple[float, float]], tuple[float, float]]


def figure(head: str, about: str, x: Axis, y: Axis, lines: Sequence[Line], *, empty: str = "no calls ended") -> Markup:
    """A plot with its heading, its caption, and a legend if it has several lines; `empty` is its text without any."""
    wide, tall = BOX.width - BOX.left - BOX.right, BOX.height - BOX.top - BOX.bottom

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return BOX.left + wide * x.place(point[0]), BOX.top + tall - tall * y.place(point[1])

    named = [line for line in lines if line.name]
    return render(
        "figure.html.jinja",
        box=BOX,
        head=head,
        about=about,
        label=f"{head}: {_said(lines, y)}.",
        key=named[::-1] if len(named) > 1 else [],
        is_log=y.log,
        empty="" if _values(lines) else empty,
        y_marks=[(place((x.low, value))[1], text) for value, text in y.marks],
        x_marks=[
            _mark(place((value, y.low))[0], text, number in x.minor) for number, (value, text) in enumerate(x.marks)
        ],
        shapes=[
            shape for line in lines for shape in (_bars(line, place) if line.style == "bars" else _line(line, place))
        ],
        tips=_tips(lines, x, y, place),
    )


def _mark(at: float, text: str, is_minor: bool) -> _Mark:
    end = BOX.width - BOX.right
    # The text at the end of the axis is aligned to the edge of the plot; the others are centred under their marks.
    style, text_at = ("y", at + BOX.right) if at > end - BOX.right else ("x", at)
    return _Mark(at, text, text_at, f"{style} minor" if is_minor else style)


def _line(line: Line, place: Place) -> Iterator[_Shape]:
    """A line through its points. A point without a neighbour is a dot, and so is each one if there are few."""
    if line.range and line.style == "a" and len(line.points) > CHUNKS:
        bands = zip(*(_pieces(thin(line.points, how), place) for how in (min, max)), strict=True)
        yield _Shape("band", "".join(f"M{_through(low)}L{_through(high[::-1])}Z" for low, high in bands if low))
    pieces = _pieces(thin(line.points, statistics.median if line.range else max), place)
    path = "".join("M" + _through(piece) for piece in pieces if len(piece) > 1)
    yield _Shape(
        line.style, path, [it for piece in pieces if len(piece) == 1 or len(line.points) <= 12 for it in piece]
    )


def _bars(line: Line, place: Place) -> Iterator[_Shape]:
    bottom = BOX.height - BOX.bottom
    points = [place((x, y)) for x, y in thin(line.points) if y]
    width = max(1.5, min(8.0, 0.7 * (BOX.width - BOX.left - BOX.right) / len(line.points)))
    yield _Shape(line.style, "".join(f"M{x:.1f} {bottom}V{min(y, bottom - 1.5):.1f}" for x, y in points), width=width)


def _pieces(points: Sequence[Point], place: Place) -> list[list[tuple[float, float]]]:
    """The places of the points, in pieces between the gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(place((x, y)))
    return pieces


def _through(piece: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in piece)


def thin(points: Sequence[Point], how: Callable[[list[float]], float] = max) -> list[Point]:
    """At most `CHUNKS` points: each part of a longer line becomes one point, or a gap if it has no value."""
    if len(points) <= CHUNKS:
        return list(points)
    size = math.ceil(len(points) / CHUNKS)
    kept: list[Point] = []
    for at in range(0, len(points), size):
        chunk = points[at : at + size]
        values = [y for _, y in chunk if y is not None]
        kept.append((chunk[len(chunk) // 2][0], how(values) if values else None))
    return kept


def _tips(lines: Sequence[Line], x: Axis, y: Axis, place: Place) -> Iterator[_Tip]:
    """The values of all lines at each place, for the pointer."""
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
        yield _Tip(left, right - left, f"{where}: {', '.join(said)}")


def _range(values: Sequence[float], axis: Axis) -> str:
    if not values:
        return "none"
    low, high = axis.say(min(values)), axis.say(max(values))
    return low if low == high else f"{low} to {high}"


def _said(lines: Sequence[Line], y: Axis) -> str:
    """The ranges of all lines in words, for screen readers."""
    return ", ".join(f"{line.name} {_range(_values([line]), y)}" for line in reversed(lines) if line.name)
