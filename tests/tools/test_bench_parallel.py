"""tools/bench_parallel.py measures in turns, says how far to trust it, and leaves out what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
SCRIPT = TOOLS / "bench_parallel.py"

ECHO = """
import os, sys, time
sys.path.insert(0, {tools!r})
from bench_turns import serve

def build(spec):
    print("a library speaks")
    def run(steps):
        if spec.get("dies"):
            raise ArithmeticError("out of numbers")
        if spec.get("sleeps"):
            time.sleep(60)
        slowest = int(os.environ["RANK"]) == 0
        return dict(seconds=spec["seconds"] - (not slowest), cpu_seconds=0.5, loss=float(steps))
    return run

serve(build)
"""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools can be imported, as they can where a script of theirs runs."""
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.fixture
def echo(tmp_path: Path) -> list[str]:
    """The command of a rank that answers with what it was told."""
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(tools=str(TOOLS)))
    return [sys.executable, str(script)]


def test_a_training_is_measured_in_turns(tmp_path: Path):
    """Both sides of a real ratio, on processes of their own; and what has no other Python is left out, with the reason."""
    report = tmp_path / "new" / "report.json"
    chosen = ["--sections", "switches", "peer", "--switches", "fuse_projections", "--sizes", "tiny", "--layouts", "single"]
    done = bench(*chosen, "--turns", "2", "--steps", "1", "--warmup", "0", "--json", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    (row,) = found["rows"]
    assert row["section"] == "switches" and row["sides"] == ["fuse_projections=true", "fuse_projections=false"]
    assert row["details"]["turns"] == 2 and row["details"]["steps"] == 1
    assert row["ratio"] > 0 and all(seconds > 0 for seconds in row["seconds"])
    on, off = row["details"]["losses"]
    assert on == pytest.approx(off, rel=1e-5) and 4 < on < 6  # both train, on the same tokens: ln(128) = 4.85
    assert {"python", "torch", "megalm"} <= set(found["versions"]) and found["machine"]["cores"] > 0 and found["commit"]
    assert "--megatron-python" in found["left_out"]["peer"]
    assert "peer: left out: no --megatron-python" in done.stdout and "fuse_projections=true" in done.stdout


def test_the_executor_and_the_schedules_have_bounds(tmp_path: Path):
    report = tmp_path / "report.json"
    few = ["--stages", "4", "--microbatches", "8", "--executor-microbatches", "4", "--executor-ranks", "1", "--turns", "1"]
    done = bench("--sections", "executor", "schedules", *few, "--json", str(report))
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    schedules = {row["what"].split(",")[0] for row in rows if row["section"] == "schedules"}
    assert schedules == {"gpipe", "1f1b", "interleaved", "bfs", "zbh1", "zbv", "dualpipev", "csv"}
    executor = [row for row in rows if row["section"] == "executor"]
    assert len(executor) == 1 and 0 < executor[0]["seconds"][0] < executor[0]["details"]["by_the_clock_with_torch_and_transfers"]
    assert executor[0]["seconds"][1] == 100e-6
    assert all(row["seconds"][1] == 2.0 for row in rows if row["section"] == "schedules")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sections", "speed"], "invalid choice: 'speed'"),
        (["--turns", "0"], "--turns"),
        (["--stages", "7"], "--stages 7"),
        (["--sizes", "huge"], "invalid choice: 'huge'"),
        (["--layouts", "tp3"], "invalid choice: 'tp3'"),
    ],
)
def test_a_command_that_cannot_be_read(arguments: list[str], complaint: str):
    done = bench(*arguments)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_help_says_how_to_get_megatron():
    done = bench("--help")
    assert done.returncode == 0 and "megatron-core==0.16.1" in done.stdout and "--json" in done.stdout


@pytest.mark.parametrize(("python", "why"), [("/no/such/python", "cannot be run"), (sys.executable, "has no megatron-core")])
def test_a_python_without_megatron_is_an_error(python: str, why: str):
    done = bench("--sections", "peer", "--megatron-python", python)
    assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr


def test_sides_alternate_and_the_slowest_rank_counts(echo: list[str], tools: None):
    from bench_turns import alternate, start_sides

    with start_sides({"a": (echo, {"seconds": 3.0}, 2), "b": (echo, {"seconds": 2.0}, 1)}, 30) as (a, b):
        told: list[tuple[str, int]] = []
        for side in (a, b):
            side.turn = lambda steps, side=side, turn=side.turn: told.append((side.name, steps)) or turn(steps)
        found = alternate(a, b, turns=4, steps=5, warmup=7).summary()
    assert told == [("a", 7), ("b", 7), *((name, 5) for name in "abbaabba")]
    assert found["ratio"] == 1.5 and found["seconds"] == [3.0, 2.0] and found["ratio_quartiles"] == [1.5, 1.5]
    assert found["cpu_ratio"] == 2.0 and found["losses"] == [5.0, 5.0]  # two ranks' CPU against one's


@pytest.mark.parametrize(("fault", "words"), [({"dies": 1}, "out of numbers"), ({"sleeps": 1}, "did not answer within 1 s")])
def test_a_rank_that_fails_is_named(echo: list[str], fault: dict[str, Any], words: str, tools: None):
    from bench_turns import BenchError, start_sides

    with (
        pytest.raises(BenchError, match=f"broken: rank 0 .*(?s:.*){words}"),
        start_sides({"broken": (echo, {"seconds": 1.0, **fault}, 1)}, 10) as (side,),
    ):
        side.timeout = 1.0 if "sleeps" in fault else 10.0
        side.turn(1)
    assert side.processes[0].poll() is not None  # and nothing is left running


def test_verdicts(tools: None):
    from bench_report import Row, bounded, line

    def row(ratio: float, quartiles: tuple[float, float], target: float | None) -> Row:
        return Row("peer", "tp2", ("a", "b"), (ratio, 1.0), ratio, quartiles, target)

    assert row(0.9, (0.89, 0.91), 1.0).verdict == "met"
    assert row(1.1, (1.09, 1.12), 1.0).verdict == "missed"
    assert row(0.9, (0.6, 1.2), 1.0).verdict == "met noisy"
    assert row(1.1, (1.09, 1.12), None).verdict == ""
    slow = bounded("executor", "1f1b", "per action", [1e-4, 3e-4, 2e-4], 1e-4)
    assert slow.ratio == pytest.approx(2.0) and slow.verdict == "missed noisy"
    assert "per action 200 us" in line(slow) and line(slow).endswith("missed noisy")
