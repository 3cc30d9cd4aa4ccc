"""Pictures of a sweep as SVG for its page: the loss over each setting, and all settings side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megalm.launchers.sweep.axis import Axis, axis_of
from megalm.launchers.sweep.results import Row, SweepResults
from megalm.observe.words import safe

UNIT = "nats per token"
# Added to the style of the page. Letters stand out from the lines behind them.
STYLE = """
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round }
.scroll svg { min-width: 900px }
"""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 236, 46, 12, 10, 26
_WIDE, _TALL = 1160, 340  # of all settings side by side
_LETTER = 6.4  # width of a letter of 11 pixels


def metric_name(sweep: SweepResults) -> str:
    """As people say."""
    return {"valid_loss": "validation loss", "loss": "training loss"}.get(sweep.metric, sweep.metric)


def shown(sweep: SweepResults) -> list[Row]:
    """The rows that have a finite loss, worst first, so that the best is drawn over the others."""
    return [row for row in reversed(sweep.rows) if row.loss is not None and math.isfinite(row.loss)]


def axes_of(sweep: SweepResults, rows: Sequence[Row]) -> list[Axis]:
    """One per swept key, and last that of the loss."""
    axes = [axis_of(key, [row.values[key] for row in rows]) for key in sweep.keys]
    return [*axes, axis_of(metric_name(sweep), [repr(row.loss) for row in rows], cut=True)]


def places(sweep: SweepResults, axes: Sequence[Axis], row: Row) -> list[float]:
    """Of a row on each of the axes."""
    values = [*(row.values[key] for key in sweep.keys), repr(row.loss)]
    return [axis.place(value) for axis, value in zip(axes, values, strict=True)]


def colours(rows: Sequence[Row]) -> list[str]:
    """Of each row, from orange, the worst, to blue: by its rank, so that one very bad point does not make all others alike."""
    worst, best = (234, 140, 70), (37, 99, 235)
    shares = [rank / max(1, len(rows) - 1) if len(rows) > 1 else 1.0 for rank in range(len(rows))]
    return ["#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(worst, best, strict=True)) for share in shares]


def slices(sweep: SweepResults) -> list[tuple[str, str]]:
    """(key, SVG) of every swept key: its value below, the loss of each point above."""
    rows = shown(sweep)
    if not rows:
        return []
    *axes, loss = axes_of(sweep, rows)
    return [(axis.name, _slice(sweep, rows, axis, loss)) for axis in axes]


def _slice(sweep: SweepResults, rows: Sequence[Row], across: Axis, up: Axis) -> str:
    parts, marks = list[str](), across.ticks()
    letters = max(4, int((_WIDTH - _LEFT) / max(1, len(marks)) / _LETTER) - 1)
    for place, text in marks:
        parts.append(_line(_x(place), _HEIGHT - _BOTTOM, _x(place), _HEIGHT - _BOTTOM + 4, "axis"))
        parts.append(_text(_x(place), _HEIGHT - _BOTTOM + 17, text, "middle", "tick", letters))
    for place, text in up.ticks():
        parts.append(_line(_LEFT, _y(place), _WIDTH - _RIGHT, _y(place), "grid"))
        parts.append(_text(_LEFT - 6, _y(place) + 4, text, "end", "tick"))
    parts.append(_line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis"))
    for row, colour in zip(rows, colours(rows), strict=True):
        x, y = _x(across.place(row.values[across.name])), _y(up.place(repr(row.loss)))
        paint = f'fill="none" stroke="{colour}" stroke-width="1.6"' if row.status == "pruned" else f'fill="{colour}"'
        if up.is_beyond(repr(row.loss)):
            parts.append(f'<path d="M{x - 5:.1f} {y + 5:.1f}h10l-5 -9z" {paint}>{_title(row)}</path>')
        else:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {paint}>{_title(row)}</circle>')
    return _svg(_WIDTH, _HEIGHT, parts, f"{up.name} over {across.name}")


def parallel(sweep: SweepResults) -> str:
    """One SVG: an axis per swept key and one for the loss; a point is a line through all of them. Empty without a loss."""
    rows = shown(sweep)
    if not rows:
        return ""
    axes = axes_of(sweep, rows)
    column = max(150.0, _WIDE / len(axes))
    width, parts = round(column * len(axes)), list[str]()
    for rank, (row, colour) in enumerate(zip(rows, colours(rows), strict=True)):
        heights = [_y(place, _TALL) for place in places(sweep, axes, row)]
        points = " ".join(f"{column * (i + 0.5):.1f},{height:.1f}" for i, height in enumerate(heights))
        dash = ' stroke-dasharray="4 3"' if row.status == "pruned" else ""
        stroke = f'stroke="{colour}" stroke-width="{3 if rank == len(rows) - 1 else 1.5}"'
        parts.append(f'<polyline fill="none" {stroke}{dash} points="{points}">{_title(row)}</polyline>')
    letters = int(column / _LETTER) - 2
    for i, axis in enumerate(axes):
        x = column * (i + 0.5)
        parts += [_line(x, _y(0, _TALL), x, _y(1, _TALL), "axis"), _text(x, _TALL - 10, axis.name, "middle", "", letters)]
        parts += [_text(x + 6, _y(place, _TALL) + 4, text, "start", "halo", letters // 2) for place, text in axis.ticks()]
    return _svg(width, _TALL, parts, "all settings side by side")


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - _RIGHT)


def _y(place: float, height: int = _HEIGHT) -> float:
    return height - _BOTTOM - place * (height - _BOTTOM - _TOP)


def _title(row: Row) -> str:
    settings = " ".join(f"{key}={value}" for key, value in row.values.items())
    return f"<title>{safe(f'point {row.name}: {row.loss:.4f} ({row.status}, step {row.step}) {settings}')}</title>"


def _text(x: float, y: float, text: str, anchor: str, style: str, letters: int = 40) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text, letters)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line class="{style}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(title)}">{"".join(parts)}</svg>'
