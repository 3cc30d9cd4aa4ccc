"""tools/draw_attention.py: the tiles that it draws are those that the mask asks for, and rows come the longest first."""

from __future__ import annotations

import runpy
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from megalm_kernels.attention.call import ALL, Call, visible

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "draw_attention.py"
TOOL = runpy.run_path(str(SCRIPT))
MASKS = {
    **TOOL["MASKS"],
    "both sides": ((700,), 100, 37),
    "every key": ((300,), ALL, ALL),
    "short documents": ((1, 129, 3, 128), 40, 0),
}


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_the_tiles_are_those_of_the_mask(mask: str, block_k: int):
    """By brute force: none of a tile seen: not visited; all of it: no mask; else, and where the keys end in it: masked."""
    lengths, left, right = MASKS[mask]
    drawn = {}
    for row in TOOL["rows_of"](lengths, left, right, 128, block_k):
        for key, kind in row.tiles:
            assert (row.start + row.first, row.start + key) not in drawn, "visited twice"
            drawn[row.start + row.first, row.start + key] = kind
    wanted = {}
    for start, length in zip([0, *accumulate(lengths)], lengths, strict=False):
        seen = visible(length, length, Call(left, right, 1.0), torch.device("cpu"))
        for first in range(0, length, 128):
            for key in range(0, length, block_k):
                tile = seen[first : first + 128, key : key + block_k]
                if tile.any():
                    whole = bool(tile.all()) and key + block_k <= length
                    wanted[start + first, start + key] = TOOL["WHOLE"] if whole else TOOL["EDGE"]
    assert drawn == wanted


def test_rows_with_most_to_do_are_taken_first():
    rows = TOOL["rows_of"]((2048,), ALL, 0)
    assert [len(row.tiles) for row in rows] == list(range(16, 0, -1))
    packed = TOOL["rows_of"]((800, 208, 600, 440), ALL, 0)
    documents = ((1608, 440), (1008, 600), (800, 208), (0, 800))
    wanted = [(start, first) for start, length in documents for first in reversed(range(0, length, 128))]
    assert [(row.start, row.first) for row in packed] == wanted


def test_the_figure_is_drawn_and_shown(tmp_path: Path):
    done = subprocess.run([sys.executable, SCRIPT, "-o", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.iterdir()
    committed = (ROOT / "docs" / "images" / picture.name).read_text()
    for words in ("causal: 136 tiles, 16 masked", "not visited"):
        assert words in picture.read_text() and words in committed
    assert f"images/{picture.name}" in (ROOT / "docs" / "kernels.md").read_text()


def test_the_table_of_features_is_the_one_that_calls_are_checked_by():
    table = TOOL["feature_table"]()
    assert table in (ROOT / "docs" / "kernels.md").read_text(), "python tools/draw_attention.py --table"
    for line in ("| sinks | yes |  |  | yes |", "| dropout | yes |", "| causal | yes | yes | yes | yes | yes | yes |"):
        assert line in table


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, SCRIPT, "-o", tmp_path / "file" / "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
