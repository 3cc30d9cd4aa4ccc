"""Pictures of timelines: for the terminal, as SVG, and as PNG (with matplotlib).

Forward, whole backward and its two halves have a colour each; a lighter one (in the terminal a small letter) is a later
chunk. Time goes to the right, ranks go down.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

from megalm.errors import ConfigError, Problem, writing
from megalm.parallel.actions import BACKWARD, FORWARD, INPUT, WEIGHT
from megalm.parallel.timeline import Span, Timeline

# (first chunk, later chunks)
COLOURS = {
    FORWARD: ("#2563eb", "#93c5fd"),
    BACKWARD: ("#15803d", "#86efac"),
    INPUT: ("#0f766e", "#5eead4"),
    WEIGHT: ("#c2410c", "#fdba74"),
}
NAMES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "gradients of inputs", WEIGHT: "gradients of weights"}
_ANSI = {FORWARD: ("44;97", "104;30"), BACKWARD: ("42;97", "102;30"), INPUT: ("46;97", "106;30"), WEIGHT: ("43;97", "103;30")}
_IDLE = "."
_INK, _PAPER, _GRID = "#0f172a", "#ffffff", "#e2e8f0"
_LABEL, _ROW, _TITLE, _AXIS, _LANE = 64, 22, 26, 22, 7  # pixels
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Mark(NamedTuple):
    """Something that happened below a rank's bar."""

    lane: int  # 0 or 1, from above
    start: float
    end: float
    colour: str
    title: str


class Panel(NamedTuple):
    """One timeline of a picture. `unit`: of its times."""

    title: str
    timeline: Timeline
    unit: str = ""
    names: tuple[str, ...] = ()  # of the ranks; rank 0, 1 ... if not given
    marks: tuple[tuple[Mark, ...], ...] = ()  # by rank
    legend: tuple[tuple[str, str], ...] = ()  # (colour, what its marks mean)

    @property
    def row(self) -> int:
        """Pixels of a rank's row."""
        return _ROW + (2 * _LANE + 2) * bool(self.marks)


def chunks_of(timeline: Timeline) -> list[dict[int, int]]:
    """By rank: {stage: which of the rank's chunks it is}."""
    return [{s: i for i, s in enumerate(sorted({span.action.stage for span in spans}))} for spans in timeline.spans]


def draw_text(timeline: Timeline, width: int, colour: bool = False) -> str:
    """One line per rank, `width` columns. Small letters are later chunks, dots are idle time."""
    label = len(f"rank {len(timeline.spans) - 1} ")
    columns = max(1, width - label)
    scale = _columns_per_time(timeline, columns)
    columns = min(columns, round(scale * timeline.makespan))
    longest = max((len(str(span.action.microbatch)) for spans in timeline.spans for span in spans), default=0)
    numbered = scale * _shortest(timeline) >= longest + 1 + (not colour)
    rows = zip(timeline.spans, chunks_of(timeline), strict=True)
    lines = [_text_row(spans, chunks, (timeline.start, scale, columns), numbered, colour) for spans, chunks in rows]
    return "\n".join(f"{f'rank {rank}':{label}}{line}" for rank, line in enumerate(lines))


def shows_all(timeline: Timeline, width: int) -> bool:
    """Every action has a column of its own in the terminal."""
    return _shortest(timeline) * (width - len(f"rank {len(timeline.spans) - 1} ")) >= timeline.makespan


def _shortest(timeline: Timeline) -> float:
    return min((span.end - span.start for spans in timeline.spans for span in spans if span.end > span.start), default=1.0)


def _columns_per_time(timeline: Timeline, columns: int) -> float:
    """What fits; if the shortest action has a column, whole columns for it, so that equal times look equal."""
    scale, shortest = columns / (timeline.makespan or 1.0), _shortest(timeline)
    return int(scale * shortest + 1e-9) / shortest if scale * shortest >= 1 else scale


def _text_row(
    spans: tuple[Span, ...], chunks: dict[int, int], axis: tuple[float, float, int], numbered: bool, colour: bool
) -> str:
    """`axis`: the time at the left edge, columns per time, columns."""
    zero, scale, columns = axis
    cells, styles = [_IDLE] * columns, [""] * columns
    for (kind, stage, microbatch), start, end in spans:
        first, last = round((start - zero) * scale), min(columns, round((end - zero) * scale))
        later = chunks[stage] > 0
        letter = kind.lower() if later else kind
        room = max(0, last - first)
        cells[first:last] = f"{letter}{microbatch}".ljust(room)[:room] if numbered else letter * room
        styles[first:last] = [_ANSI[kind][later]] * room
    if not colour:
        return "".join(cells)
    parts = [cells[0] if not styles[0] else f"\x1b[{styles[0]}m{cells[0]}"] if cells else []
    for before, style, cell in zip(styles, styles[1:], cells[1:], strict=False):
        change = "" if style == before else ("\x1b[0m" + (f"\x1b[{style}m" if style else ""))
        parts.append(change + cell)
    return "".join([*parts, "\x1b[0m"])


def draw_svg(panels: list[Panel], width: int = 1600) -> str:
    """Panels below one another, on one time axis if their units are the same; opens in any browser."""
    parts, top = [], 8
    for panel in panels:
        same = [p.timeline.makespan for p in panels if p.unit == panel.unit]
        scale = (width - _LABEL - 8) / (max(same) or 1.0)
        parts.append(f'<text x="8" y="{top + 16}" font-size="14" font-weight="600">{escape(panel.title)}</text>')
        parts += [*_svg_rows(panel, top + _TITLE, scale, width), *_svg_marks(panel, top + _TITLE + _ROW - 1, scale)]
        top += _TITLE + panel.row * len(panel.timeline.spans)
        step = f"{panel.timeline.makespan:.4g} {panel.unit}".strip()
        parts.append(f'<text x="{_LABEL}" y="{top + 14}" font-size="11" fill="#475569">0 to {escape(step)}</text>')
        top += _AXIS
    kinds = [k for k in NAMES if any(s.action.kind == k for p in panels for spans in p.timeline.spans for s in spans)]
    for i, kind in enumerate(kinds):
        x = _LABEL + i * 190
        parts.append(f'<rect x="{x}" y="{top}" width="14" height="14" fill="{COLOURS[kind][0]}"/>')
        parts.append(f'<rect x="{x + 16}" y="{top}" width="14" height="14" fill="{COLOURS[kind][1]}"/>')
        parts.append(f'<text x="{x + 36}" y="{top + 12}" font-size="12">{NAMES[kind]}</text>')
    for colour, meaning in dict.fromkeys(entry for panel in panels for entry in panel.legend):
        top += 20
        parts.append(f'<rect x="{_LABEL}" y="{top + 3}" width="30" height="{_LANE}" fill="{colour}"/>')
        parts.append(f'<text x="{_LABEL + 36}" y="{top + 12}" font-size="12">{escape(meaning)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 24}" width="{width}" height="{top + 24}"'
    ground = f'<rect width="100%" height="100%" fill="{_PAPER}"/>'
    return "\n".join([f'{head} font-family="{_FONT}" fill="{_INK}">', ground, *parts, "</svg>\n"])


def _svg_rows(panel: Panel, top: int, scale: float, width: int) -> list[str]:
    parts, timeline = [], panel.timeline
    for rank, (spans, chunks) in enumerate(zip(timeline.spans, chunks_of(timeline), strict=True)):
        y, name = top + rank * panel.row, panel.names[rank] if panel.names else f"rank {rank}"
        parts.append(f'<text x="8" y="{y + 15}" font-size="12">{escape(name)}</text>')
        parts.append(f'<rect x="{_LABEL}" y="{y}" width="{width - _LABEL - 8}" height="{_ROW - 2}" fill="{_GRID}"/>')
        for (kind, stage, microbatch), start, end in spans:
            x, room = _LABEL + (start - timeline.start) * scale, (end - start) * scale
            later = chunks[stage] > 0
            name = f"{NAMES[kind]}, stage {stage}, microbatch {microbatch}"
            box = f'x="{x:.2f}" y="{y}" width="{max(room, 0.2):.2f}" height="{_ROW - 2}"'
            edge = f' stroke="{_PAPER}" stroke-width="0.5"' if room > 2 else ""
            parts.append(f'<rect {box} fill="{COLOURS[kind][later]}"{edge}><title>{name}</title></rect>')
            if room >= 6 * len(str(microbatch)) + 2:
                ink = _INK if later else _PAPER
                middle = f'x="{x + room / 2:.2f}" y="{y + 14}" font-size="10" text-anchor="middle" fill="{ink}"'
                parts.append(f'<text {middle} pointer-events="none">{microbatch}</text>')
    return parts


def _svg_marks(panel: Panel, top: int, scale: float) -> list[str]:
    """Two thin lanes below each rank's bar."""
    parts = []
    for rank, marks in enumerate(panel.marks):
        for lane, start, end, colour, title in marks:
            place = f'x="{_LABEL + (start - panel.timeline.start) * scale:.2f}" y="{top + rank * panel.row + lane * _LANE}"'
            size = f'width="{max((end - start) * scale, 0.2):.2f}" height="{_LANE - 1}"'
            parts.append(f'<rect {place} {size} fill="{colour}"><title>{escape(title)}</title></rect>')
    return parts


def save_picture(path: str, panels: list[Panel], key: str) -> None:
    """Write a picture, .svg or .png by its name. `key`: the setting that names the file.

    Raises ConfigError if matplotlib is needed and not there, RunError if the file cannot be written.
    """
    with writing(Path(path), key):
        if path.endswith(".svg"):
            Path(path).write_text(draw_svg(panels), encoding="utf-8")
        else:
            _save_png(path, panels, key)


def _save_png(path: str, panels: list[Panel], key: str) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        fix = f'pip install "megalm[viz]", or {key}={Path(path).with_suffix(".svg")}, which needs nothing'
        raise ConfigError(Problem(key, path, f"a PNG needs matplotlib, which is not installed ({error})", fix=fix)) from error
    ranks = [len(panel.timeline.spans) for panel in panels]
    figure = Figure(figsize=(16, sum(0.3 * count + 1.1 for count in ranks)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [count + 2 for count in ranks]})
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for rank, (spans, chunks) in enumerate(zip(panel.timeline.spans, chunks_of(panel.timeline), strict=True)):
            bars = [(span.start - panel.timeline.start, span.end - span.start) for span in spans]
            colours = [COLOURS[span.action.kind][chunks[span.action.stage] > 0] for span in spans]
            axis.broken_barh(bars, (rank - 0.45, 0.9), facecolors=colours, edgecolors=_PAPER, linewidth=0.4)
        axis.set_yticks(range(len(panel.timeline.spans)), [f"rank {rank}" for rank in range(len(panel.timeline.spans))])
        axis.invert_yaxis()
        axis.set_xlim(0, max(p.timeline.makespan for p in panels if p.unit == panel.unit) or 1)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set_xlabel(panel.unit)
    shown = {span.action.kind for panel in panels for spans in panel.timeline.spans for span in spans}
    marks = [Patch(color=COLOURS[kind][0], label=NAMES[kind]) for kind in NAMES if kind in shown]
    figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), frameon=False, fontsize=9)
    figure.savefig(path)
