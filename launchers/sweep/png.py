"""The pictures of a sweep with matplotlib, for slides and for where no browser is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.launchers.sweep.axis import Axis
from megalm.launchers.sweep.draw import UNIT, axes_of, colours, places, shown
from megalm.launchers.sweep.results import Row, SweepResults

_COLUMNS = 3  # pictures in a row
_NOTE = "blue: better; hollow, dashed: ended early by the search; triangle: off the top"


def write_png(sweep: SweepResults, folder: Path) -> list[Path]:
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

    axes, written = axes_of(sweep, rows), []
    for name, draw in (("slices.png", _slices), ("parallel.png", _parallel)):
        figure = draw(pyplot, sweep, rows, axes)
        figure.savefig(folder / name, dpi=130, bbox_inches="tight")
        pyplot.close(figure)
        written.append(folder / name)
    return written


def _slices(pyplot: Any, sweep: SweepResults, rows: Sequence[Row], axes: Sequence[Axis]) -> Any:
    *settings, loss = axes
    columns = min(_COLUMNS, len(settings))
    lines = -(-len(settings) // columns)
    size = (4.2 * columns, 3.2 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for field in grid.flat[len(settings) :]:
        field.set_axis_off()
    for number, (axis, field) in enumerate(zip(settings, grid.flat, strict=False)):
        for row, colour in zip(rows, colours(rows), strict=True):
            own = places(sweep, axes, row)
            fill = "none" if row.status == "pruned" else colour
            marker = "^" if loss.is_beyond(repr(row.loss)) else "o"
            field.scatter(own[number], own[-1], s=34, facecolors=fill, edgecolors=colour, marker=marker, zorder=3, clip_on=False)
        field.set_xticks([at for at, _ in axis.ticks()], [text for _, text in axis.ticks()])
        field.set_yticks([at for at, _ in loss.ticks()], [text for _, text in loss.ticks()])
        field.set(xlim=(0, 1), ylim=(0, 1), xlabel=axis.name, ylabel="" if number % columns else f"{loss.name} ({UNIT})")
        field.grid(axis="y", alpha=0.3)
        field.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_NOTE, fontsize=8)
    return figure


def _parallel(pyplot: Any, sweep: SweepResults, rows: Sequence[Row], axes: Sequence[Axis]) -> Any:
    from matplotlib.patheffects import withStroke

    figure, field = pyplot.subplots(figsize=(1.5 + 2 * len(axes), 3.8), layout="constrained")
    for rank, (row, colour) in enumerate(zip(rows, colours(rows), strict=True)):
        style, width = "--" if row.status == "pruned" else "-", 2.6 if rank == len(rows) - 1 else 1.2
        field.plot(range(len(axes)), places(sweep, axes, row), style, color=colour, linewidth=width)
    for i, axis in enumerate(axes):
        field.axvline(i, color="0.6", linewidth=0.8)
        for at, text in axis.ticks():
            halo = [withStroke(linewidth=2.5, foreground="white")]
            field.text(i + 0.03, at, text, fontsize=7.5, verticalalignment="center", path_effects=halo, zorder=5)
    field.set_xticks(range(len(axes)), [axis.name for axis in axes], fontsize=8.5)
    field.set_yticks([])
    field.set(ylim=(0, 1), xlim=(-0.2, len(axes) - 0.5))
    field.spines[:].set_visible(False)
    figure.suptitle(_NOTE, fontsize=8)
    return figure
