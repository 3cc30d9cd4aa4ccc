"""tools/bench_context.py: what a line says, and that sharing a sample saves memory and sends what the formula says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.dist
def test_lengths_are_measured_and_compared_to_one_rank(tmp_path: Path) -> None:
    report, length = tmp_path / "report.json", 512
    command = [sys.executable, str(TOOLS / "bench_context.py"), "--lengths", str(length), "--layers", "1", "--steps", "2"]
    done = subprocess.run([*command, "--json", str(report)], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    one, ring, ulysses = found["rows"]
    assert [row["layout"] for row in found["rows"]] == ["single", "cp2_ring", "cp2_ulysses"]
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [[str(length), row["layout"]] for row in found["rows"]]
    half = 0.4 * one["tensor_bytes"], 0.75 * one["tensor_bytes"]
    assert half[0] < ring["tensor_bytes"] < half[1] and half[0] < ulysses["tensor_bytes"] < half[1]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["resident_bytes"] >= 0 for row in found["rows"])
    width, heads, pairs = 16, 4, 2  # of the model that is measured: 64 features
    assert one["sent_bytes_per_layer"] == 0
    assert ring["sent_bytes_per_layer"] == 2 * length * pairs * width * (2 * 0.5 * 4 + 4)
    assert ulysses["sent_bytes_per_layer"] == 4 * length * (heads + pairs) * width * 4 / 4
    assert found["options"]["lengths"] == [length] and found["commit"]


def test_a_line_has_ratios_to_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_context import Result, line

    mib = 2**20
    one = Result("single", 4096, 8 * mib, 16 * mib, 2.0, 1.6, 0.0)
    two = Result("cp2_ring", 4096, 4 * mib, 12 * mib, 1.0, 0.8, 3.0 * mib)
    assert " ".join(line(two, one).split()) == "4096 cp2_ring 4.0 MiB 0.50 12.0 MiB 0.75 1.000 s 0.50 0.800 s 0.50 3.00 MiB"
    assert " ".join(line(one, None).split()) == "4096 single 8.0 MiB 1.00 16.0 MiB 1.00 2.000 s 1.00 1.600 s 1.00 0.00 MiB"
    nothing = Result("single", 4096, 0, 0, 2.0, 1.6, 0.0)
    assert line(two, nothing).split()[:5] == ["4096", "cp2_ring", "4.0", "MiB", "12.0"]  # no ratio to nothing
