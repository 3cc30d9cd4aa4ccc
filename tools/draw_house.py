"""Draw docs/images/house.svg: `python tools/draw_house.py [-o FILE]`.

The floors are those of tools/floors.py, the rooms those that are on disk, each with the first sentence of its docstring;
the arrows are the way of the data. A room that moves in or out changes the picture, and a test asks for it.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import floors

ROOT = Path(__file__).resolve().parent.parent
PICTURE = Path("docs/images/house.svg")
WAY = ["megalm.data", "megalm.models", "megalm.objectives", "megalm.optim", "megalm.checkpoint", "megalm.inference"]

WIDTH, MARGIN, LABEL = 1000, 92, 58  # of the picture; beside the house; of the column with the floors' numbers
GAP, BETWEEN, PAD = 24, 30, 13  # between floors, between rooms, between a room's wall and its text
LINE, LETTER = 17, 7.1  # height of a line and width of a letter of the text, pixels
TITLE = 146  # width of the name of a room that has a floor to itself
ROOF = 92
PAPER, WALL, INK, QUIET, FLOW = "#ffffff", "#94a3b8", "#0f172a", "#475569", "#c2410c"
TINTS = ["#e0e7ff", "#dbeafe", "#e0f2fe", "#cffafe", "#d1fae5", "#dcfce7", "#ecfccb", "#fef9c3", "#ffedd5", "#f1f5f9"]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Room:
    """A room and its place in the picture."""

    name: str  # dotted
    lines: list[str]
    tint: str
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width


def file_of(room: str, root: Path) -> Path | None:
    """The file whose docstring says what a room is; None if the room is not there."""
    for folder, package in floors.SOURCES.items():
        if floors.is_in(room, package):
            path = root / folder / room.removeprefix(package).lstrip(".").replace(".", "/")
            found = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
            if found:
                return found[0]
    return None


def sentence(file: Path) -> str:
    """The first sentence of a module's docstring, without the marks of code."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return (text.split(". ")[0].rstrip(".") + ".").replace("`", "") if text else ""


def wrap(text: str, letters: int) -> list[str]:
    """As few lines as fit, of about equal length."""
    lines = len(textwrap.wrap(text, letters))
    widths = range(max(map(len, text.split()), default=1), letters)
    return textwrap.wrap(text, next((width for width in widths if len(textwrap.wrap(text, width)) == lines), letters))


def furnish(root: Path) -> tuple[list[tuple[str, list[Room]]], float]:
    """(floor, its rooms) from the top, and the height of the house; floors without a room are left out."""
    storeys, y = [], float(ROOF + 40)
    for tint, (floor, names) in zip(TINTS, floors.FLOORS, strict=True):
        files = {name: file for name in names if (file := file_of(name, root))}
        if not files:
            continue
        inside = WIDTH - 2 * MARGIN - LABEL - PAD
        width = (inside - BETWEEN * (len(files) - 1)) / len(files)
        room_for_text = width - 2 * PAD - (TITLE if len(files) == 1 else 0)
        texts = {name: wrap(sentence(file), int(room_for_text / LETTER)) for name, file in files.items()}
        height = 2 * PAD + LINE * max(map(len, texts.values())) + (0 if len(files) == 1 else 15)
        places = {name: MARGIN + LABEL + i * (width + BETWEEN) for i, name in enumerate(files)}
        storeys.append((floor, [Room(name, texts[name], tint, places[name], y, width, height) for name in files]))
        y += height + GAP
    return storeys, y


def draw_text(x: float, y: float, text: str, size: float = 13, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{more}>{escape(text)}</text>'


def draw_room(room: Room) -> str:
    """A box with the room's name and its sentence, which stands beside the name where one room has the whole floor."""
    title = room.name if room.name.startswith("megalm_") else room.name.removeprefix("megalm.")
    parts = [
        f'<rect x="{room.x:g}" y="{room.y:g}" width="{room.width:g}" height="{room.height:g}" rx="7" fill="{room.tint}" '
        f'stroke="{WALL}"/>',
        draw_text(room.x + PAD, room.y + PAD + 12, title, 15, INK, ' font-weight="700"'),
    ]
    alone = room.width > WIDTH / 2
    x, y = (room.x + PAD + TITLE, room.y + PAD + 12) if alone else (room.x + PAD, room.y + PAD + 31)
    lines = [draw_text(x, y + LINE * i, line, 13, QUIET) for i, line in enumerate(room.lines)]
    return "\n".join(parts + lines)


def draw_arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{FLOW}" stroke-width="4" marker-end="url(#tip)"/>'


def draw_way(rooms: dict[str, Room]) -> str:
    """Arrows from text through the rooms of WAY to text: sideways on a floor, up between floors."""
    stops = [rooms[name] for name in WAY if name in rooms]
    if not stops:
        return ""
    first, last, above = stops[0], stops[-1], 0.0
    level = first.y + first.height - 18  # below the floor's number
    parts = [draw_text(MARGIN / 2 - 8, level + 5, "text", 15, FLOW, ' font-weight="700" text-anchor="middle"')]
    parts.append(draw_arrow(MARGIN / 2 + 14, level, first.x - 9, level))
    for here, there in itertools.pairwise(stops):
        if here.y == there.y:
            middle = here.y + min(here.height, there.height) / 2
            parts.append(draw_arrow(here.right + 2, middle, there.x - 9, middle))
            continue
        low, high = max(here.x, there.x), min(here.right, there.right)
        above = above if low < above < high else (low + high) / 2
        parts.append(draw_arrow(above, here.y - 2, above, there.y + there.height + 9))
    level = last.y + last.height / 2
    parts.append(draw_arrow(last.right + 2, level, WIDTH - MARGIN / 2 - 22, level))
    parts.append(draw_text(WIDTH - MARGIN / 2 + 12, level + 5, "text", 15, FLOW, ' font-weight="700" text-anchor="middle"'))
    return "\n".join(parts)


def draw_shell(ground: float) -> str:
    """Roof, walls and the line of the ground."""
    left, right, eaves = MARGIN - 6, WIDTH - MARGIN + 6, ROOF + 18
    return (
        f'<path d="M{left - 26} {eaves}L{WIDTH / 2:g} 22L{right + 26} {eaves}Z" fill="#f8fafc" stroke="{WALL}" '
        f'stroke-width="2" stroke-linejoin="round"/>\n'
        f'<path d="M{left} {eaves}V{ground:g}H{right}V{eaves}" fill="#f8fafc" stroke="{WALL}" stroke-width="2"/>\n'
        f'<path d="M20 {ground:g}H{WIDTH - 20}" stroke="{WALL}" stroke-width="3"/>\n'
        + draw_text(WIDTH / 2, ROOF - 6, "megalm", 26, INK, ' font-weight="700" text-anchor="middle"')
    )


def draw_house(root: Path) -> str:
    """The whole picture."""
    storeys, ground = furnish(root)
    rooms = {room.name: room for _, found in storeys for room in found}
    numbers = []
    for floor, found in storeys:
        level, number = found[0].y + found[0].height / 2 + 5, floor.removesuffix(" (base)")
        shown = "" if floor != number else number  # the base of a floor lies under it, without a number of its own
        numbers.append(draw_text(MARGIN + LABEL / 2 - 4, level, shown, 16, QUIET, ' font-weight="700" text-anchor="middle"'))
    bans = "; ".join(f"{room.split('.')[-1]} never imports {', '.join(b.split('.')[-1] for b in banned)}"
                     for room, banned in floors.BANS.items())  # fmt: skip
    notes = [
        "Arrows: the way of the data. Imports go down only: a room uses the floors below it, never its neighbours.",
        f"And {bans}.",
    ]
    height = ground + 74
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="{FONT}" role="img" '
        f'aria-label="The rooms of megalm, floor by floor">\n'
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="3" refY="5" markerWidth="3.2" markerHeight="3.2" orient="auto">'
        f'<path d="M0 0L10 5L0 10Z" fill="{FLOW}"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{height:g}" rx="14" fill="{PAPER}"/>'
    )
    foot = [
        draw_text(WIDTH / 2, ground + 28 + 20 * i, note, 13, QUIET, ' text-anchor="middle"') for i, note in enumerate(notes)
    ]
    return "\n".join([head, draw_shell(ground), *numbers, *map(draw_room, rooms.values()), draw_way(rooms), *foot, "</svg>\n"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the rooms of megalm, floor by floor.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / PICTURE)
    output = parser.parse_args(arguments).output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(draw_house(ROOT), encoding="utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
