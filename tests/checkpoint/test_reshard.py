"""Any box of a tensor, cut out of any pieces, is the slice of the whole."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.checkpoint.reshard import read_box, read_whole
from megalm.checkpoint.sharded import read_manifest, write_manifest, write_pieces
from megalm.errors import CheckpointError

Cuts = list[list[int]]


def write(folder: Path, whole: torch.Tensor, cuts: Cuts) -> None:
    """One piece per box between the cuts, dealt to ranks in turn."""
    edges = [list(itertools.pairwise([0, *sorted(set(cut)), n])) for cut, n in zip(cuts, whole.shape, strict=True)]
    for rank, box in enumerate(itertools.product(*edges)):
        part = whole[tuple(slice(a, b) for a, b in box)]
        write_pieces(folder, rank, {"weight/x": (part, tuple(whole.shape), tuple(a for a, _ in box))})
    write_manifest(folder, {}, {})


@st.composite
def cut_and_box(draw: st.DrawFn) -> tuple[list[int], Cuts, list[tuple[int, int]]]:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    cuts = [draw(st.lists(st.integers(1, n - 1), max_size=3)) if n > 1 else [] for n in shape]
    box = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        box.append((start, draw(st.integers(start + 1, n))))
    return shape, cuts, box


@settings(max_examples=60, deadline=None)
@given(cut_and_box())
def test_a_box_is_a_slice(case: tuple[list[int], Cuts, list[tuple[int, int]]]) -> None:
    shape, cuts, box = case
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, whole, cuts)
        manifest = read_manifest(folder)
        found = read_box(folder, manifest, "weight/x", tuple(a for a, _ in box), tuple(b - a for a, b in box))
        assert torch.equal(found, whole[tuple(slice(a, b) for a, b in box)])
        assert torch.equal(read_whole(folder, manifest, "weight/x"), whole)


@pytest.mark.parametrize("missing", range(4))
def test_a_piece_that_is_not_there(missing: int, tmp_path: Path) -> None:
    whole = torch.randn(6, 6)
    write(tmp_path, whole, [[4], [3]])
    manifest = read_manifest(tmp_path)
    del manifest.pieces["weight/x"][missing]
    with pytest.raises(CheckpointError, match=r"weight/x = \d+ of 36 elements"):
        read_whole(tmp_path, manifest, "weight/x")
    corners = [(0, 0), (0, 3), (4, 0), (4, 3)]
    for number, corner in enumerate(corners):
        if number == missing:
            with pytest.raises(CheckpointError, match="0 of 4 elements"):
                read_box(tmp_path, manifest, "weight/x", corner, (2, 2))
        else:
            a, b = corner
            assert torch.equal(read_box(tmp_path, manifest, "weight/x", corner, (2, 2)), whole[a : a + 2, b : b + 2])


def test_a_box_beyond_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(4), [[]])
    with pytest.raises(CheckpointError, match="3 of 4 elements"):
        read_box(tmp_path, read_manifest(tmp_path), "weight/x", (1,), (4,))


def test_an_unknown_tensor(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(4), [[]])
    for read in (lambda m: read_whole(tmp_path, m, "weight/y"), lambda m: read_box(tmp_path, m, "weight/y", (0,), (4,))):
        with pytest.raises(CheckpointError, match="use a checkpoint of the same model"):
            read(read_manifest(tmp_path))
