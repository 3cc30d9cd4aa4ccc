"""tools/draw_house.py: the committed picture shows the rooms that are there, and a room that moves in or out changes it."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "house.svg"
TEXT = "{http://www.w3.org/2000/svg}text"


def draw(output: Path, script: Path = ROOT / "tools" / "draw_house.py") -> str:
    subprocess.run([sys.executable, str(script), "-o", str(output)], check=True, capture_output=True)
    return output.read_text(encoding="utf-8")


def words(picture: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(picture).iter(TEXT)]


def small_house(root: Path, rooms: list[str]) -> Path:
    """A checkout with this checkout's tools and these rooms only; returns its draw_house.py."""
    (root / "tools").mkdir(parents=True)
    for name in ("floors.py", "draw_house.py"):
        (root / "tools" / name).write_text((ROOT / "tools" / name).read_text())
    for room in rooms:
        (root / "megalm" / room).mkdir(parents=True)
        (root / "megalm" / room / "__init__.py").write_text(f'"""What {room} < does. And more."""\n')
    return root / "tools" / "draw_house.py"


def test_the_committed_picture_is_current(tmp_path: Path):
    told = "draw it anew: python tools/draw_house.py"
    assert draw(tmp_path / "house.svg") == PICTURE.read_text(encoding="utf-8"), told


def test_it_shows_every_room_once():
    found = words(PICTURE.read_text(encoding="utf-8"))
    rooms = [path.parent.name for path in (ROOT / "megalm").glob("*/__init__.py")]
    assert rooms and all(found.count(room) == 1 for room in [*rooms, "launchers", "megalm_kernels", "errors"])


def test_rooms_that_are_not_there_are_not_shown(tmp_path: Path):
    picture = draw(tmp_path / "a.svg", small_house(tmp_path / "a", ["data", "train"]))
    found = words(picture)
    assert {"data", "train", "F7", "F2"} <= set(found)
    assert not {"models", "serve", "F3", "F6", "launchers"} & set(found)
    assert "What data < does." in found  # the first sentence, and its sign is written as XML wants it
    assert picture != draw(tmp_path / "b.svg", small_house(tmp_path / "b", ["data"]))


def test_the_way_of_the_data_has_one_arrow_per_step(tmp_path: Path):
    arrow = "url(#tip)"
    assert draw(tmp_path / "a.svg", small_house(tmp_path / "a", ["data", "models", "optim"])).count(arrow) == 4
    assert draw(tmp_path / "b.svg", small_house(tmp_path / "b", ["train"])).count(arrow) == 0


def test_no_line_of_text_leaves_the_picture():
    house = ET.fromstring(PICTURE.read_text(encoding="utf-8"))
    width = float(house.attrib["viewBox"].split()[2])
    for element in house.iter(TEXT):
        if element.attrib.get("text-anchor") != "middle":
            assert float(element.attrib["x"]) + 7.1 * len(element.text or "") < width
