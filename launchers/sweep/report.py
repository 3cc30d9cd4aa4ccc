"""`megalm sweep report FOLDER`: the points of a sweep as a table, as pictures, and the best one as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.errors import writing
from megalm.launchers.sweep.draw import STYLE as OURS
from megalm.launchers.sweep.draw import UNIT, metric_name, parallel, slices
from megalm.launchers.sweep.png import write_png
from megalm.launchers.sweep.results import Row, SweepResults, read_sweep
from megalm.observe.parts import panel, table
from megalm.observe.style import POLICY, STYLE
from megalm.observe.words import clean, safe
from megalm.runfolder import replace_file

_COLOURS = "Blue is better. Hollow or dashed: ended early by the search. A triangle: so bad that it is off the top."


def report(config: Any) -> None:
    """Prints the table, writes the page and the pictures. Raises ConfigError where there is no sweep."""
    options = config.sweep
    sweep = read_sweep(Path(options.folder))
    print(as_text(sweep, options.rows))
    page = Path(options.output or sweep.folder / "report.html")
    with writing(page, "sweep.output"):
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_file(page, as_page(sweep))
        pictures = write_png(sweep, page.parent)
    print("\n".join(map(str, [page, *pictures])))


def as_text(sweep: SweepResults, rows: int) -> str:
    """For a terminal; the best `rows` points, 0: all."""
    parts = [_text_table(sweep, sweep.keys, sweep.rows[: rows or None], "point")]
    if rows and len(sweep.rows) > rows:
        parts.append(f"... and {len(sweep.rows) - rows} more (sweep.rows=0 shows all)")
    if sweep.groups:
        parts += ["", _text_table(sweep, _keys(sweep), sweep.groups, "points")]
    best = sweep.best
    said = "nothing is finished yet"
    if best:
        said = f"best: {clean(best.name)}, {sweep.metric} {_loss(best)}\n  {clean(best.command, 4000)}"
    return "\n".join([*parts, "", said])


def as_page(sweep: SweepResults) -> str:
    """One HTML file that loads nothing and runs nothing."""
    best, title = sweep.best, f"Sweep {sweep.folder.absolute().name}"
    parts = [f"<h1>{safe(title)}</h1>", f'<p class="quiet">{safe(str(sweep.folder.absolute()))}; {_count(sweep)}</p>']
    if best:
        parts.append(f"<h2>Best: {safe(metric_name(sweep))} {_loss(best)}, point {safe(best.name)}</h2>")
        parts.append(panel(f"<code>{safe(best.command, 4000)}</code>"))
    if sweep.groups:
        parts += ["<h2>Over the folds</h2>", _html_table(sweep, _keys(sweep), sweep.groups)]
    pictures = slices(sweep)
    if pictures:
        figures = [f"<figure><h3>{safe(key)}</h3>{picture}</figure>" for key, picture in pictures]
        parts += ["<h2>Loss over each setting</h2>", f'<p class="quiet">{safe(metric_name(sweep))}, {UNIT}. {_COLOURS}</p>']
        parts += [f'<div class="grid">{"".join(figures)}</div>', "<h2>All settings side by side</h2>"]
        parts += [panel(f'<div class="scroll">{parallel(sweep)}</div>')]
    parts += ["<h2>Points</h2>", _html_table(sweep, sweep.keys, sweep.rows)]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{safe(title)}</title><style>{STYLE}{OURS}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _keys(sweep: SweepResults) -> list[str]:
    return [key for key in sweep.keys if key in sweep.groups[0].values]


def _cells(keys: list[str], row: Row) -> list[str]:
    return [row.name, _loss(row), str(row.step), row.status, *(_value(row.values[key]) for key in keys)]


def _value(text: str) -> str:
    """A drawn number has 17 digits, of which four tell it from the others; the command has them all."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def _loss(row: Row) -> str:
    if row.loss is None:
        return "-"
    return f"{row.loss:.4f}" + (f" +- {row.spread:.4f} ({row.folds} folds)" if row.spread is not None else "")


def _text_table(sweep: SweepResults, keys: list[str], rows: list[Row], first: str) -> str:
    lines = [[first, sweep.metric, "step", "status", *keys], *(_cells(keys, row) for row in rows)]
    lines = [[clean(cell, 60) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _html_table(sweep: SweepResults, keys: list[str], rows: list[Row]) -> str:
    return table(["point", sweep.metric, "step", "status", *keys], [_cells(keys, row) for row in rows], "-nn-")


def _count(sweep: SweepResults) -> str:
    known = dict.fromkeys(row.status for row in sweep.rows)
    return ", ".join(f"{sum(row.status == status for row in sweep.rows)} {safe(status)}" for status in known)
