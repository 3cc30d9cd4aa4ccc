"""Pieces of the page: figures, tables, cards, bars. Whatever goes into them is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count as counter

from megalm.observe.chart import Chart, draw
from megalm.observe.words import safe

_WIDE, _SMALL = (1180, 340), (400, 216)  # pixels of the pictures: across the page, in the grid
_ROWS, _CELLS = 64, 4096  # of a map: more rows are left out, more columns are joined by their greatest value


class Figures:
    """Draws charts, each with names of its own in the page."""

    def __init__(self) -> None:
        self.names = counter()

    def small(self, chart: Chart, caption: str = "") -> str:
        """One of the grid; nothing where there is nothing to draw."""
        if not any(line.points for line in chart.lines):
            return ""
        picture = draw(chart, *_SMALL, f"c{next(self.names)}")
        return f"<figure><h3>{safe(chart.title)}</h3>{legend(chart)}{picture}{_caption(caption)}</figure>"

    def wide(self, chart: Chart, caption: str = "") -> str:
        """Across the page, with a second picture for a phone, where the first one's letters would be too small to read."""
        if not any(line.points for line in chart.lines):
            return ""
        large, phone = draw(chart, *_WIDE, f"c{next(self.names)}"), draw(chart, _SMALL[0], 260, f"c{next(self.names)}")
        pictures = f'<div class="wide">{large}</div><div class="narrow">{phone}</div>'
        return f"<figure><h3>{safe(chart.title)}</h3>{legend(chart)}{pictures}{_caption(caption)}</figure>"


def legend(chart: Chart) -> str:
    """Names of the curves, if there are several."""
    shown = [line for line in chart.lines if line.points]
    entries = [f'<span><i class="{line.style}"></i>{safe(line.name)}</span>' for line in shown]
    return f'<div class="legend">{"".join(entries)}</div>' if len(shown) > 1 else ""


def _caption(text: str) -> str:
    return f"<figcaption>{safe(text, 600)}</figcaption>" if text else ""


def cards(rows: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, a word more)."""
    texts = [f'<div class="card"><span>{safe(n)}</span><b>{safe(v)}</b><span>{safe(more)}</span></div>' for n, v, more in rows]
    return f'<div class="cards">{"".join(texts)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kinds: str = "") -> str:
    """`kinds`: a letter for each column: n number, t time, v value, w wide text, - plain."""
    classes = [{"n": "n", "t": "t", "v": "v", "w": "wide"}.get(kind, "") for kind in kinds.ljust(len(head), "-")]
    top = "".join(f'<th class="{kind}">{safe(text)}</th>' for kind, text in zip(classes, head, strict=True))
    body = []
    for row in rows:
        cells = (f'<td class="{kind}">{safe(text, 500)}</td>' for kind, text in zip(classes, row, strict=True))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def verbatim(lines: Sequence[str]) -> str:
    """Text as it was printed, at most 300 lines."""
    more = ["..."] if len(lines) > 300 else []
    return f'<div class="scroll"><pre>{chr(10).join(safe(line) for line in [*lines[:300], *more])}</pre></div>'


def panel(*parts: str) -> str:
    return f'<div class="panel">{"".join(parts)}</div>'


def stacked(parts: Sequence[tuple[str, float, str, str]]) -> str:
    """One bar and its legend from (name, share of the whole, style, value)."""
    shown = [part for part in parts if part[1] > 0]
    pieces = [f'<i class="{style}" style="flex:{share:.5f}" title="{safe(name)}"></i>' for name, share, style, _ in shown]
    names = [f'<span><i class="{style}"></i>{safe(name)}: {safe(value)}</span>' for name, _, style, value in parts]
    return f'<div class="bar">{"".join(pieces)}</div><div class="legend">{"".join(names)}</div>'


def tracks(rows: Iterable[tuple[str, float, float, str]]) -> str:
    """Bars with a mark on each, from (name, share of the bar, share at which the mark is, value)."""
    texts = [
        f'<span>{safe(name)}</span><div class="track"><i style="width:{_percent(bar)}"></i>'
        f'<u style="left:{_percent(mark)}"></u></div><span>{safe(value)}</span>'
        for name, bar, mark, value in rows
    ]
    return f'<div class="ranks">{"".join(texts)}</div>'


def _percent(share: float) -> str:
    return f"{min(1.0, max(0.0, share)):.2%}"


def heat_map(rows: dict[str, list[float]], title: str) -> str:
    """A cell for each value, pale at 1, strong at 0 and at 2 and above."""
    shown = dict(list(rows.items())[:_ROWS])
    columns = max(1, min(max(map(len, shown.values())), _CELLS // len(shown)))
    left, width, height = 54, 1180, 16
    parts = [f'<svg viewBox="0 0 {width} {height * len(shown)}" role="img" aria-label="{safe(title)}">']
    for index, (name, values) in enumerate(shown.items()):
        parts.append(f'<text class="tick" x="{left - 6}" y="{height * index + 12}" text-anchor="end">{safe(name, 12)}</text>')
        step, cells = (width - left) / columns, min(columns, len(values))
        for column in range(cells):
            first, last = column * len(values) // cells, (column + 1) * len(values) // cells
            value = max(values[first:last])
            strength = min(1.0, abs(value - 1)) * 0.92 + 0.08
            where = f"expert {first}" if last == first + 1 else f"experts {first} to {last - 1}, the fullest"
            style = f'class="cell {"over" if value >= 1 else "under"}" fill-opacity="{strength:.2f}"'
            place = f'x="{left + column * step:.1f}" y="{height * index}" width="{step:.1f}" height="{height - 1}"'
            parts.append(f"<rect {style} {place}><title>layer {safe(name, 12)}, {where}: {value:.3g}</title></rect>")
    return "".join([*parts, "</svg>"])
