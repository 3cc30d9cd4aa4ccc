"""tools/draw_parallelism.py: the figures of docs/parallelism.md come from the code that runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "draw_parallelism.py"


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "-o", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn and set(drawn) <= {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert all("<svg" in text for text in drawn.values())
    assert "attention.out" in drawn["tensor_parallel.svg"] and "microbatch" in drawn["zero.svg"]
    text = (ROOT / "docs" / "parallelism.md").read_text()
    assert all(f"images/{name}" in text for name in drawn)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "images"
    done = subprocess.run([sys.executable, SCRIPT, "-o", target], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and str(target) in done.stderr and "Traceback" not in done.stderr


def test_the_slices_cover_every_matrix_once() -> None:
    shards = runpy.run_path(str(SCRIPT))["shards_by_rank"](4)
    for name, parts in shards.items():
        rows, columns = parts[0][0].global_shape
        held = sum(shape[0] * shape[1] / shard.copies - shard.padding * shape[1] for shard, shape in parts)
        assert held == rows * columns, name
    assert {shard.copies for shard, _ in shards["layers.0.attention.k"]} == {2}
    assert sum(shard.padding for shard, _ in shards["head"]) == 2


def test_the_table_has_the_figures_numbers() -> None:
    table = runpy.run_path(str(SCRIPT))["states_table"](7_000_000_000, 8)
    assert "| zero 0 | 14.0 | 28.0 | 28.0 | 56.0 | 0.0 | 126.0 |" in table
    assert table in (ROOT / "docs" / "parallelism.md").read_text()


def test_a_ring_computes_every_score_once_and_all_ranks_have_the_same_work_in_every_step() -> None:
    size, length = 4, 32
    for name, parts in runpy.run_path(str(SCRIPT))["ring_blocks"](size, length).items():
        total = sum(seen.long() for _, _, seen in parts)
        assert (total == torch.ones(length, length).tril()).all(), name
        work = {(rank, step): int(seen.sum()) for rank, step, seen in parts}
        is_balanced = all(len({work[rank, step] for rank in range(size)}) == 1 for step in range(size))
        assert is_balanced == (name == "zig-zag")


def test_rows_leave_and_arrive_in_the_order_of_the_experts() -> None:
    routed = runpy.run_path(str(SCRIPT))["routed_tokens"]()
    for rank, part in enumerate(routed):
        assert part.experts == sorted(part.experts) and len(part.tokens) == 2 * 6
        arriving = [expert for other in routed for expert in other.experts if expert // 2 == rank]
        ordered = [arriving[place] for place in part.order]
        assert ordered == sorted(arriving) != arriving, "nothing would be shown"
        assert sum(map(sum, part.counts)) == len(arriving)
