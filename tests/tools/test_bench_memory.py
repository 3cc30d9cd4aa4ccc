"""tools/bench_memory.py reads what runs have written, says who is fullest and who is furthest off; its runs are valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.config.validate import check

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """The tool, which imports its neighbours."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_memory

    return bench_memory


def report(*ranks: tuple[float, float]) -> dict:
    return {
        "layout": "pp2",
        "ranks": [{"rank": i, "predicted": p * 2**20, "measured": m * 2**20} for i, (p, m) in enumerate(ranks)],
    }


def test_lines(bench) -> None:
    (one,) = bench.rows_of("a", report((98, 100), (51, 50)))
    assert bench.line(one).split() == ["a", "pp2", "0", "98.0", "MiB", "100.0", "MiB", "-2.0%"]
    full, worst = bench.rows_of("b", report((98, 100), (52, 50), (45, 50)))
    assert (full.rank, worst.rank) == (0, 2)
    assert bench.line(worst, again=True).split() == ["2", "45.0", "MiB", "50.0", "MiB", "-10.0%"]
    assert len({len(bench.line(row, again)) for row, again in ((None, False), (one, False), (worst, True))}) == 1


def test_verdict(bench) -> None:
    rows = [*bench.rows_of("a", report((98, 100))), *bench.rows_of("b", report((100, 100), (44, 50)))]
    assert bench.verdict(rows, 0.05) == ("furthest off: b, rank 1, -12.0%; further off than 5%: b", False)
    assert bench.verdict(rows[:2], 0.05) == ("furthest off: a, rank 0, -2.0%; all are within 5%", True)


def test_every_run_is_one_that_megalm_accepts(bench, tmp_path: Path) -> None:
    """With at least two microbatches on every rank, and the last step measured."""
    assert len(bench.RUNS) >= 15
    for name in bench.RUNS:
        config = bench.configure(name, tmp_path, 2)
        check(config)  # raises
        assert config.num_microbatches == bench.MICROBATCHES and config.train.memory_step == config.train.steps == 2


def test_a_real_run(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Smaller than what it is for; what cannot be is not within anything."""
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | {"hidden_size": 64, "num_layers": 1, "ffn_size": 128, "vocab_size": 128})
    monkeypatch.setattr(bench, "LENGTH", 64)
    file = tmp_path / "found.json"
    assert bench.main(["--runs", "full", "--within", "0.5", "--json", str(file)]) == 0
    assert "all are within 50%" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["name"] == "full" and row["off"] == row["predicted"] / row["measured"] - 1
    monkeypatch.setattr(bench, "LENGTH", 0)
    assert bench.main(["--runs", "full"]) == 1
    assert "full: exit" in capsys.readouterr().err
