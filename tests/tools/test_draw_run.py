"""tools/draw_run.py: the committed picture is the one that the code draws, and its numbers are those of the page."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_picture_is_current(tmp_path: Path) -> None:
    script, new = ROOT / "tools" / "draw_run.py", tmp_path / "run.svg"
    subprocess.run([sys.executable, str(script), "-o", str(new)], check=True, capture_output=True, timeout=60)
    picture = new.read_text(encoding="utf-8")
    assert picture == (ROOT / "docs" / "images" / "run.svg").read_text(encoding="utf-8"), "draw it anew: python tools/draw_run.py"
    texts = [element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert "24 h of steps that counted in 30 h: effective time 80%" in texts
