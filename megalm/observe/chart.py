"""Line charts as SVG that goes into a page: no library, no script, colours by the page's style sheet, values under the pointer.

Why not matplotlib: its SVG has one set of colours (a page is read by day and by night), letters as outlines that cannot
be searched or read aloud, 50 KB a picture, and it is not always installed. A chart of these takes 10 KB and a millisecond.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from megalm.observe.folder import Points
from megalm.observe.words import safe, short

POINTS = 240  # of a curve; of a longer one the mean, the least and the greatest of each of so many stretches
_COLUMNS = 80  # places that answer to the pointer
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 12, 24  # pixels around the field
_LETTER, _LINE = 6.4, 15  # width of a letter and height of a line of 11 pixels
_SPIKE = 3.0  # the picture is cut where the greatest value is so many times the spread of nearly all


@dataclass(frozen=True)
class Line:
    """A curve. `style`: its class, one of a, b, c, d and p (of a parent run)."""

    name: str
    points: Points
    style: str = "a"
    dots: bool = False  # few values, each of which counts
    smooth: bool = False  # a thick median over a pale curve


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place of the x axis."""

    x: float
    title: str


@dataclass
class Chart:
    """What a chart shows. `say_x` and `say_y`: how values are written."""

    title: str
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    say_x: Callable[[float], str] = short
    say_y: Callable[[float], str] = short
    name_x: str = "step"
    bands: list[tuple[float, float]] = field(default_factory=list)  # stretches of the x axis that are shaded
    from_zero: bool = False  # the y axis
    reach: float | None = None  # the x axis goes from 0 to here; None: over the points


@dataclass(frozen=True)
class _Frame:
    """From values to pixels."""

    left: float
    right: float
    low: float
    high: float
    width: int
    height: int

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left or 1.0)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low or 1.0)
        y = self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)
        return min(max(y, -4.0 * self.height), 5.0 * self.height)  # what is cut off must not become a number of 300 digits


def draw(chart: Chart, width: int, height: int, name: str) -> str:
    """The SVG of a chart that has at least one point. `name`: of its clip path, used once in a page."""
    thin = [(line, *thinned(line.points)) for line in chart.lines if line.points]
    frame = _frame(chart, width, height)
    marks = [mark for mark in chart.marks if frame.left <= mark.x <= frame.right][:200]
    inside = f'x="{_LEFT}" y="{_TOP - 2}" width="{width - _LEFT - _RIGHT}" height="{height - _TOP - _BOTTOM + 4}"'
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(chart.title)}">',
        f'<clipPath id="{name}"><rect {inside}/></clipPath>',
        *(
            f'<rect class="band" x="{frame.x(a):.1f}" y="{_TOP}" width="{max(1.0, frame.x(b) - frame.x(a)):.1f}" '
            f'height="{height - _TOP - _BOTTOM}"/>'
            for a, b in chart.bands
        ),
        *_axes(chart, frame),
        f'<g clip-path="url(#{name})">',
    ]
    for mark in marks:
        x = f"{frame.x(mark.x):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    for line, means, spans in thin:
        parts += _curve(line, means, spans, frame)
    parts.append("</g>")
    parts += [_flag(mark, frame) for mark in marks]
    return "".join([*parts, *_pointer(chart, frame), "</svg>"])


def thinned(points: Points) -> tuple[Points, list[tuple[float, float, float]]]:
    """(means, [(x, least, greatest)]) of at most POINTS stretches of equal length in x; short curves as they are."""
    if len(points) <= POINTS:
        return points, []
    left, right = points[0][0], points[-1][0]
    groups: dict[int, Points] = {}
    for x, y in points:
        groups.setdefault(min(POINTS - 1, int((x - left) / ((right - left) or 1.0) * POINTS)), []).append((x, y))
    means = [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups.values()]
    spans = [(x, min(y for _, y in g), max(y for _, y in g)) for (x, _), g in zip(means, groups.values(), strict=True)]
    return means, spans


def running_median(points: Points) -> Points:
    """Median of each point and its neighbours, a 25th of the curve on either side; single spikes leave no trace.

    At the left end, where curves fall steeply, it takes in fewer, so that it starts where the curve does.
    """
    widest, ys = max(2, len(points) // 25), [y for _, y in points]
    reaches = [min(widest, index) for index in range(len(points))]
    return [(x, median(ys[i - reach : i + reach + 1])) for i, ((x, _), reach) in enumerate(zip(points, reaches, strict=True))]


def limits(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    """Least and greatest value of the y axis. Single spikes are cut off: they would press all else into one line."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    inner_low, inner_high = ordered[int(len(ordered) * 0.01)], ordered[int((len(ordered) - 1) * 0.98)]
    spread = inner_high - inner_low
    if spread > 0 and high - inner_low > _SPIKE * spread:
        high = inner_high + 0.25 * spread
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between the two, at most so many."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10, 20) if factor * magnitude >= rough)
    first = math.ceil(low / step)
    return [round((first + i) * step, 12 - math.floor(math.log10(step))) for i in range(most + 1) if (first + i) * step <= high]


def _frame(chart: Chart, width: int, height: int) -> _Frame:
    xs = [x for line in chart.lines for x in (p[0] for p in line.points)]
    low, high = limits([y for line in chart.lines for _, y in line.points], chart.from_zero)
    left, right = (min(xs), max(xs)) if chart.reach is None else (min(0.0, *xs), max(chart.reach, *xs))
    return _Frame(left, right if right > left else left + 1.0, low, high, width, height)


def _axes(chart: Chart, frame: _Frame) -> list[str]:
    parts, bottom = [], frame.height - _BOTTOM
    for value in ticks(frame.low, frame.high, 5 if frame.height > 240 else 4):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{safe(chart.say_y(value))}</text>')
    for value in ticks(frame.left, frame.right, max(4, frame.width // 110)):
        x = frame.x(value)
        if _LEFT + 8 < x < frame.width - 60:
            place = f'x="{x:.1f}" y="{bottom + 16}" text-anchor="middle"'
            parts.append(f'<text class="tick" {place}>{safe(chart.say_x(value))}</text>')
    parts.append(f'<text class="tick" x="{frame.width - _RIGHT}" y="{bottom + 16}" text-anchor="end">{safe(chart.name_x)}</text>')
    highest = max(y for line in chart.lines for _, y in line.points)
    if highest > frame.high:
        place = f'x="{frame.width - _RIGHT}" y="{_TOP + 10}" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>cut off above; up to {safe(chart.say_y(highest))}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _curve(line: Line, means: Points, spans: list[tuple[float, float, float]], frame: _Frame) -> list[str]:
    parts = []
    if spans:
        above = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in spans]
        below = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(spans)]
        parts.append(f'<polygon class="area {line.style}" points="{" ".join(above + below)}"/>')
    if line.smooth and len(means) > 12:
        if not spans:
            parts.append(f'<polyline class="line {line.style} pale" points="{_path(means, frame)}"/>')
        means = running_median(means)
    parts.append(f'<polyline class="line {line.style}" points="{_path(means, frame)}"/>')
    if line.dots or len(means) == 1:
        places = [f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"' for x, y in means]
        parts += [f'<circle class="dot {line.style}" {place} r="3"/>' for place in places]
    return parts


def _path(points: Points, frame: _Frame) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _flag(mark: Mark, frame: _Frame) -> str:
    x = frame.x(mark.x)
    shape = f"{x - 4:.1f},{_TOP - 8} {x + 4:.1f},{_TOP - 8} {x:.1f},{_TOP}"
    return f'<polygon class="flag" points="{shape}"><title>{safe(mark.title)}</title></polygon>'


def _pointer(chart: Chart, frame: _Frame) -> list[str]:
    """Columns that show, when they are pointed at or tapped, what the curves say there."""
    lines = [(line, [x for x, _ in line.points]) for line in chart.lines if line.points]
    xs = sorted({x for _, places in lines for x in places if frame.left <= x <= frame.right})
    chosen = xs if len(xs) <= _COLUMNS else [xs[i * (len(xs) - 1) // (_COLUMNS - 1)] for i in range(_COLUMNS)]
    gap, parts = (xs[-1] - xs[0]) / max(1, len(chosen)), []
    for index, x in enumerate(chosen):
        before = (chosen[index - 1] + x) / 2 if index else frame.left
        after = (chosen[index + 1] + x) / 2 if index + 1 < len(chosen) else frame.right
        rows = [f"{chart.name_x} {chart.say_x(x)}"]
        for line, places in lines:
            near = _nearest(places, x)
            if abs(places[near] - x) <= max(gap, 1e-9):
                rows.append(f"{line.name} {chart.say_y(line.points[near][1])}")
        parts.append(_tip(frame, frame.x(before), frame.x(after), frame.x(x), rows))
    return parts


def _nearest(places: list[float], x: float) -> int:
    """Index of the place that is closest to x; places rise."""
    after = min(bisect_left(places, x), len(places) - 1)
    return after - 1 if after and x - places[after - 1] <= places[after] - x else after


def _tip(frame: _Frame, left: float, right: float, x: float, rows: list[str]) -> str:
    room, height = _LETTER * max(map(len, rows)) + 14, _LINE * len(rows) + 8
    at = x + 8 if x + 8 + room < frame.width else max(0.0, x - 8 - room)
    texts = "".join(f'<text x="{at + 7:.1f}" y="{_TOP + 15 + _LINE * i}">{safe(row, 80)}</text>' for i, row in enumerate(rows))
    tall = frame.height - _TOP - _BOTTOM
    return (
        f'<g class="at"><rect class="hit" x="{left:.1f}" y="{_TOP}" width="{max(0.5, right - left):.1f}" height="{tall}"/>'
        f'<g class="tip"><line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + tall}"/>'
        f'<rect x="{at:.1f}" y="{_TOP + 2}" width="{room:.0f}" height="{height}" rx="4"/>{texts}</g></g>'
    )
