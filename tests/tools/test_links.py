"""tools/links.py finds dead links, and writes moved lines anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = '''"""A file."""

LIMIT: int = 3
LOW, HIGH = 1, 2


class Room:
    size = 1

    def enter(self):
        pass


def leave():
    pass
'''


def run_links(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "links.py"), str(root), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write(root: Path, page: str) -> Path:
    (root / "docs").mkdir()
    (root / "code.py").write_text(CODE)
    (root / "docs" / "other.md").write_text("# Other page\n\n## What it says: all of it\n\n```\n# not a heading\n```\n")
    (root / "README.md").write_text("[docs](docs/page.md)\n")
    (root / "docs" / "page.md").write_text(page)
    return root / "docs" / "page.md"


GOOD = """# Page
[`LIMIT`](../code.py#L3), [`HIGH`](../code.py#L4), [`Room`](../code.py#L7), [`Room.size`](../code.py#L8),
[`Room.enter`](../code.py#L10), [`leave`](../code.py#L14), [the file](../code.py), [the folder](../docs),
[elsewhere](https://example.org/a#b), [here](#page), [there](other.md#what-it-says-all-of-it), [home](../README.md)
<img src="other.md">
```
[a block](is/not/read.md)
```
"""


def test_good_links(tmp_path: Path):
    write(tmp_path, GOOD)
    done = run_links(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "0 dead" in done.stdout


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[a](gone.md)", "gone.md: no such file"),
        ('<img src="gone.png">', "gone.png: no such file"),
        ("[a](../../outside.md)", "outside"),
        ("[a](other.md#gone)", "no such heading"),
        ("[a](other.md#not-a-heading)", "no such heading"),
        ("[a](#gone)", "no such heading"),
        ("[`gone`](../code.py#L3)", "defines no `gone`"),
        ("[`enter`](../code.py#L10)", "defines no `enter`"),
        ("[`leave`](../code.py#L13)", "is at ../code.py#L14"),
        ("[a](../data.txt#L1)", "only lines of Python files"),
    ],
)
def test_dead_links(tmp_path: Path, link: str, fault: str):
    write(tmp_path, f"# Page\n\n{link}\n")
    (tmp_path / "data.txt").write_text("")
    (tmp_path.parent / "outside.md").write_text("")
    done = run_links(tmp_path)
    assert done.returncode == 1
    assert "docs/page.md:3: " in done.stdout and fault in done.stdout and "1 dead" in done.stdout


def test_fix_writes_moved_lines_anew_and_nothing_else(tmp_path: Path):
    moved = GOOD.replace("#L10", "#L11").replace("#L3", "#L999")
    page = write(tmp_path, moved + "[`gone`](../code.py#L3)\n")
    done = run_links(tmp_path, "--fix")
    assert done.returncode == 1 and "1 dead, 2 renumbered" in done.stdout
    assert page.read_text() == GOOD + "[`gone`](../code.py#L3)\n"
