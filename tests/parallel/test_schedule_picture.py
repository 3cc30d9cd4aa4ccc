"""Pictures show every action where it runs."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from megalm.errors import ConfigError, RunError
from megalm.parallel.schedule_picture import COLOURS, Panel, draw_svg, draw_text, save_picture, shows_all
from megalm.parallel.schedules import build_schedule
from megalm.parallel.timeline import Timeline, simulate

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str = "1f1b", ranks: int = 2, microbatches: int = 2, chunks: int = 1) -> Timeline:
    return simulate(build_schedule(name, ranks, microbatches, chunks))


def test_a_pipeline_in_letters_with_and_without_numbers():
    numbered = ["rank 0 F0 F1 ......B0    ...B1    ", "rank 1 ...F0 B0    F1 B1    ......"]
    assert draw_text(timeline(), 7 + 27).splitlines() == numbered
    assert draw_text(timeline(), 7 + 12).splitlines() == ["rank 0 FF..BB.BB", "rank 1 .FBBFBB.."]


def test_small_letters_are_later_chunks_and_colour_says_the_same():
    plain = draw_text(timeline("zbv", 2, 4, 2), 200)
    assert set("FfIiWw") <= set(plain) and "B" not in plain
    coloured = draw_text(timeline("zbv", 2, 4, 2), 200, colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).replace(" ", "").startswith("rank0F0F1F2f0i0w0")
    assert "\x1b[44;97m" in coloured and all(line.endswith("\x1b[0m") for line in coloured.splitlines())


@pytest.mark.parametrize("width", [1, 20, 80, 300])
def test_no_line_is_wider_than_asked_for(width):
    line = timeline("interleaved", 3, 30, 2)
    assert max(map(len, draw_text(line, width).splitlines())) <= max(width, 8)
    assert shows_all(line, width) == (width == 300)


def test_svg_has_a_box_for_every_action_and_escapes_its_title():
    line = timeline("dualpipev", 2, 4, 2)
    root = ElementTree.fromstring(draw_svg([Panel("a < b", line), Panel("measured", line, "s")]))
    names = [box.findtext(f"{SVG}title") for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    assert len(names) == 2 * sum(map(len, line.spans))
    assert names.count("gradients of weights, stage 3, microbatch 0") == 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "measured", "rank 1", "0 to 25", "0 to 25 s"} <= set(texts)
    assert {box.get("fill") for box in root.iter(f"{SVG}rect")} >= {colour for pair in COLOURS.values() for colour in pair}


def test_png(tmp_path):
    pytest.importorskip("matplotlib", reason="an optional extra")
    save_picture(str(tmp_path / "a.png"), [Panel("a", timeline()), Panel("b", timeline("zbv", 2, 4, 2))], "k")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'a PNG needs matplotlib(.|\n)*pip install "megalm\[viz\]", or k=.*a.svg'):
        save_picture(str(tmp_path / "a.png"), [Panel("a", timeline())], "k")


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(RunError, match=r"cannot write"):
        save_picture(str(tmp_path / "no" / "a.svg"), [Panel("a", timeline())], "k")


def test_nothing_to_draw():
    empty = Timeline(((), ()))
    assert draw_text(empty, 80).splitlines() == ["rank 0 ", "rank 1 "]
    ElementTree.fromstring(draw_svg([Panel("empty", empty)]))
