"""Pictures of a sweep, as SVG in a page and with matplotlib as PNG: loss over each setting, and all settings side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.launchers.sweep.results import Row, Sweep
from megalm.observe.words import safe

_WIDTH, _HEIGHT, _SIDE, _TOP, _BOTTOM = 380, 240, 58, 14, 40
_COLUMN = 170  # between two axes of parallel coordinates
_FEW = 6  # different values, from which not each has a mark of its own
_LOG_FROM = 20  # greatest over least, from which an axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """Where a value lies, from 0 to 1. `words`: of an axis that is no scale, in its order."""

    name: str
    low: float = 0
    high: float = 1
    log: bool = False
    words: tuple[str, ...] = ()
    values: tuple[float, ...] = ()  # of a scale on which there are few

    def place(self, text: str) -> float:
        """Of a value as typed."""
        if self.words:
            return self.words.index(text) / max(1, len(self.words) - 1) if len(self.words) > 1 else 0.5
        low, high, value = (self._scale(x) for x in (self.low, self.high, float(text)))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(place, what stands there)."""
        if self.words:
            return [(self.place(word), word) for word in self.words]
        if self.values:
            return [(self.place(str(value)), f"{value:.3g}") for value in self.values]
        low, high = self._scale(self.low), self._scale(self.high)
        values = [low + part / 3 * (high - low) for part in range(4)] if high > low else [low]
        return [(i / max(1, len(values) - 1), f"{10**v if self.log else v:.3g}") for i, v in enumerate(values)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


def axis_of(name: str, texts: Sequence[str]) -> Axis:
    """Numbers get a scale, anything else a place for each word."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return Axis(name, words=tuple(dict.fromkeys(texts)))
    if not all(math.isfinite(value) for value in values):
        return Axis(name, words=tuple(dict.fromkeys(texts)))
    low, high = min(values), max(values)
    few = tuple(sorted(set(values))) if len(set(values)) < _FEW and len(set(values)) < len(values) else ()
    return Axis(name, low, high, log=low > 0 and high / low >= _LOG_FROM, values=few)


def shown(sweep: Sweep) -> list[Row]:
    """The rows that have a finite loss, worst first, so that the best is drawn over the others."""
    return [row for row in reversed(sweep.rows) if row.loss is not None and math.isfinite(row.loss)]


def slices(sweep: Sweep) -> list[str]:
    """An SVG per swept key: its value below, the loss of each point above."""
    rows = shown(sweep)
    pictures = []
    for key in sweep.keys if rows else []:
        across, up = axis_of(key, [row.values[key] for row in rows]), axis_of(sweep.metric, [str(row.loss) for row in rows])
        parts = [_text(_x(0.5), _HEIGHT - 4, key, "middle")]
        parts += [_text(_x(place), _HEIGHT - _BOTTOM + 18, text, "middle") for place, text in across.ticks()]
        for place, text in up.ticks():
            parts += [_text(_SIDE - 8, _y(place) + 4, text, "end"), _line(_x(0), _y(place), _x(1), _y(place))]
        for rank, row in enumerate(rows):
            x, y = _x(across.place(row.values[key])), _y(up.place(str(row.loss)))
            hollow = row.status == "pruned"
            colour = _colour(rank / max(1, len(rows) - 1))
            fill = f'fill="none" stroke="{colour}" stroke-width="1.5"' if hollow else f'fill="{colour}"'
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}>{_title(row)}</circle>')
        pictures.append(_svg(_WIDTH, _HEIGHT, parts, f"{sweep.metric} over {key}"))
    return pictures


def parallel(sweep: Sweep) -> str:
    """One SVG: an axis per swept key and one for the loss; a point is a line through all of them."""
    rows = shown(sweep)
    if not rows:
        return ""
    axes = [axis_of(key, [row.values[key] for row in rows]) for key in sweep.keys]
    axes.append(axis_of(sweep.metric, [str(row.loss) for row in rows]))
    width, parts = _COLUMN * len(axes), list[str]()
    for rank, row in enumerate(rows):
        values = [*(row.values[key] for key in sweep.keys), str(row.loss)]
        heights = [_y(axis.place(value)) for axis, value in zip(axes, values, strict=True)]
        points = " ".join(f"{_COLUMN * (i + 0.5):.1f},{height:.1f}" for i, height in enumerate(heights))
        dash = ' stroke-dasharray="4 3"' if row.status == "pruned" else ""
        stroke = f'stroke="{_colour(rank / max(1, len(rows) - 1))}" stroke-width="{3 if rank == len(rows) - 1 else 1.5}"'
        parts.append(f'<polyline fill="none" {stroke}{dash} points="{points}">{_title(row)}</polyline>')
    for i, axis in enumerate(axes):
        x = _COLUMN * (i + 0.5)
        parts.append(_line(x, _y(0), x, _y(1)) + _text(x, _HEIGHT - 8, axis.name, "middle"))
        parts += [_text(x + 5, _y(place) + 4, text, "start") for place, text in axis.ticks()]
    return _svg(width, _HEIGHT, parts, "all settings side by side")


def write_png(sweep: Sweep, folder: Path) -> list[Path]:
    """slices.png and parallel.png; none where matplotlib is not installed or nothing has a loss yet. Raises OSError."""
    rows = shown(sweep)
    try:
        import matplotlib
    except ImportError:
        return []
    if not rows or not sweep.keys:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(sweep.keys), figsize=(4 * len(sweep.keys), 3.2), squeeze=False, sharey=True)
    for key, place in zip(sweep.keys, places[0], strict=True):
        axis = axis_of(key, [row.values[key] for row in rows])
        for rank, row in enumerate(rows):
            colour = _colour(rank / max(1, len(rows) - 1))
            place.scatter(axis.place(row.values[key]), row.loss, color=colour, marker="x" if row.status == "pruned" else "o")
        place.set_xticks([at for at, _ in axis.ticks()], [text for _, text in axis.ticks()])
        place.set_xlabel(key)
    places[0][0].set_ylabel(sweep.metric)
    first = folder / "slices.png"
    figure.savefig(first, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    axes = [axis_of(key, [row.values[key] for row in rows]) for key in sweep.keys]
    axes.append(axis_of(sweep.metric, [str(row.loss) for row in rows]))
    figure, place = pyplot.subplots(figsize=(2 + 2 * len(axes), 3.6))
    for rank, row in enumerate(rows):
        values = [*(row.values[key] for key in sweep.keys), str(row.loss)]
        heights = [axis.place(value) for axis, value in zip(axes, values, strict=True)]
        colour = _colour(rank / max(1, len(rows) - 1))
        place.plot(range(len(axes)), heights, "--" if row.status == "pruned" else "-", color=colour)
    for i, axis in enumerate(axes):
        place.axvline(i, color="0.7", linewidth=0.8)
        for at, text in axis.ticks():
            place.text(i + 0.03, at, text, fontsize=7)
    place.set_xticks(range(len(axes)), [axis.name for axis in axes])
    place.set_yticks([])
    second = folder / "parallel.png"
    figure.savefig(second, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return [first, second]


def _x(place: float) -> float:
    return _SIDE + place * (_WIDTH - _SIDE - 24)


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _BOTTOM - _TOP)


def _colour(goodness: float) -> str:
    """From orange, the worst, to blue."""
    worst, best = (234, 140, 70), (37, 99, 235)
    return "#" + "".join(f"{round(a + goodness * (b - a)):02x}" for a, b in zip(worst, best, strict=True))


def _title(row: Row) -> str:
    settings = " ".join(f"{key}={value}" for key, value in row.values.items())
    return f"<title>{safe(f'point {row.name}: {row.loss:.4f} ({row.status}) {settings}')}</title>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="currentColor">{safe(text, 24)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="currentColor" opacity="0.2"/>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{safe(title)}">'
    return head + "".join(parts) + "</svg>"
