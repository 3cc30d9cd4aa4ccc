"""The order, the memory and the failures of tools/gpu_round.sh, with a Python that only writes down what it is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from megalm_kernels.benchmarks.report import Ceilings, Row, complete

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["install", "tests", "cache", "bench-norms", "bench-adam", "bench-pointwise", "bench-loss", "parity", "step", "collect"]
RECORDER = """#!/usr/bin/env bash
echo "$*" >>"$RECORD"
cat >/dev/null
[ -z "${BREAK:-}" ] || [[ "$*" != *"$BREAK"* ]] || { echo "it broke"; exit 3; }
[[ "$*" != *gpu_report* ]] || mkdir -p "$GPU_ROUND_OUT_SEEN/results"
"""


def load(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_round(tmp_path):
    """Runs the script with these arguments and variables; the process, and what Python was asked since the last call."""
    python, record, out = tmp_path / "python", tmp_path / "record", tmp_path / "out"
    python.write_text(RECORDER)
    python.chmod(0o755)

    def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
        record.write_text("")
        seen = out / "dry-run" if "--dry-run" in arguments else out
        own = {"PYTHON": str(python), "RECORD": str(record), "GPU_ROUND_OUT": str(out), "GPU_ROUND_OUT_SEEN": str(seen)}
        env = {**os.environ, **own, "GPU_ROUND_SITE": str(tmp_path / "site"), **variables}
        command = ["bash", str(ROOT / "tools" / "gpu_round.sh"), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        return done, record.read_text()

    return run


def states(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_one_step_after_the_other(gpu_round):
    done, asked = gpu_round()
    assert done.returncode == 0, done.stderr
    assert "--no-index" in asked and "-m pytest" not in asked
    done, asked = gpu_round()
    assert "-m pytest" in asked and "-m gpu" in asked and "--no-index" not in asked
    listed = states(gpu_round("--list")[0].stdout)
    assert list(listed) == STEPS
    assert listed == {"install": "ok", "tests": "ok"} | dict.fromkeys(STEPS[2:], "not run")


def test_all_of_it_and_then_nothing(gpu_round):
    done, asked = gpu_round("--all")
    assert done.returncode == 0, done.stdout + done.stderr
    order = ["--no-index", "-m pytest", "gpu_cache.py", "rms_norm", "fused_adam", "swiglu", "cross_entropy", "gpu_parity.py"]
    places = [asked.index(text) for text in [*order, "bench_step.py", "gpu_report.py"]]
    assert places == sorted(places)
    assert asked.count("--device cuda") == 4 and "--dry-run" not in asked
    assert set(states(gpu_round("--list")[0].stdout).values()) == {"ok"}
    done, asked = gpu_round("--all")
    assert "every step is done" in done.stdout and not asked


def test_a_step_that_fails_stops_the_round_and_is_run_again(gpu_round):
    done, asked = gpu_round("--all", BREAK="gpu_cache.py")
    assert done.returncode == 1
    assert "it broke" in done.stdout
    assert "cache failed (exit 3)" in done.stderr and "to run it again: " in done.stderr
    assert "rms_norm" not in asked
    assert states(gpu_round("--list")[0].stdout)["cache"] == "failed"
    done, asked = gpu_round()
    assert done.returncode == 0 and "gpu_cache.py" in asked and "-m pytest" not in asked


def test_the_first_command_of_a_step_that_fails_ends_it(gpu_round):
    done, _ = gpu_round("install", BREAK="--target")
    assert done.returncode == 1 and "install failed (exit 3)" in done.stderr


def test_steps_by_name_on_a_machine_that_has_nothing_yet(gpu_round):
    done, asked = gpu_round("parity", "tests")
    assert done.returncode == 0, done.stderr
    assert asked.index("--no-index") < asked.index("gpu_parity.py") < asked.index("-m pytest")


def test_a_dry_run_asks_for_no_gpu_and_keeps_its_results_apart(gpu_round):
    done, asked = gpu_round("--dry-run", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked.count("--device cpu") == 4 and "--device cuda" not in asked
    assert all("--dry-run" in line for line in asked.splitlines() if "gpu_cache.py" in line or "gpu_parity.py" in line)
    assert "needs a GPU" in done.stdout
    assert set(states(gpu_round("--list")[0].stdout).values()) == {"not run"}
    assert set(states(gpu_round("--dry-run", "--list")[0].stdout).values()) == {"ok"}


def test_what_is_installed_is_what_the_checkout_has(gpu_round, tmp_path):
    gpu_round("install")
    assert "--no-index" not in gpu_round("parity")[1]
    os.utime(tmp_path / "site" / "installed", (0, 0))  # older than every file
    assert "--no-index" in gpu_round("parity")[1]


def test_wrong_arguments(gpu_round):
    done, asked = gpu_round("benchmark")
    assert done.returncode == 1 and "no step is called benchmark" in done.stderr and "bench-norms" in done.stderr and not asked
    assert gpu_round("--out")[0].returncode == 1
    assert "the next step" in gpu_round("--help")[0].stdout


def test_parity_judges():
    compare = load("gpu_parity").compare
    falling = [5.0, 4.0, 3.0]
    assert compare(falling, falling, 0.0) == {"largest_relative_difference": 0.0, "problem": ""}
    assert compare(falling, [5.0, 4.004, 3.0], 1e-2)["problem"] == ""
    assert compare(falling, [5.0, 4.004, 3.0], 1e-4)["problem"] == "step 2 is 0.001 apart, allowed 0.0001"
    assert compare(falling, [5.0, float("nan"), 3.0], 1e-4)["problem"]
    assert compare(falling, falling[:2], 1e-4)["problem"] == "3 and 2 steps"
    assert compare([5.0, 5.0], [5.0, 5.0], 1e-4)["problem"].startswith("nothing was learned")


def test_the_report_of_a_round(tmp_path, capsys):
    top = Ceilings(4300.0, 790.0, 1, 1)
    base = Row("rms_norm", "8 x 8", "bfloat16", "triton", "forward", "bytes", 10**9, 0, ms_p20=0.9, ms_p50=1.0, ms_p80=1.1)
    failed = Row("rms_norm", "8 x 8", "bfloat16", "liger", "forward", "bytes", 10**9, 0, status="failed", reason="a | b")

    def bench(name: str, date: str, *rows: Row) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        found = {"label": "", "date": date, "machine": {"gpu": "NVIDIA H200"}, "versions": {"torch": "2"}}
        found |= {"ceilings": asdict(top), "absent": [], "rows": [asdict(row) for row in complete(rows, top)]}
        (tmp_path / name / f"{date}.json").write_text(json.dumps(found))

    bench("bench-norms", "2026-01-02T03", base)
    bench("bench-norms", "2026-01-02T04", Row(**{**asdict(base), "ms_p50": 0.5}), failed)
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite tests="7" failures="1" errors="0" skipped="2"/></testsuites>')
    (tmp_path / "parity.json").write_text(json.dumps({"largest_relative_difference": 1e-6, "problem": ""}))
    (tmp_path / "steps.txt").write_text("parity failed\nparity ok\n")
    assert load("gpu_report").main([str(tmp_path), "--commit", "abc"]) == 0
    found = json.loads((tmp_path / "results/nvidia-h200/2026-01-02.json").read_text())
    assert [row["ms_p50"] for row in found["rows"]] == [0.5, None], "the later run counts"
    assert found["tests"] == {"tests": 7, "failures": 1, "errors": 0, "skipped": 2}
    assert found["steps"] == {"parity": "ok"} and found["step"] is None and found["commit"] == "abc"
    text = (tmp_path / "results/nvidia-h200/2026-01-02.md").read_text()
    assert "| rms_norm | 8 x 8 | bfloat16 | forward | triton | 0.5000 |" in text and "2000" in text
    assert "failed: a / b" in text and "1 failures" in text and "parity: the same" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1, "every line of the table has the same number of cells"
    capsys.readouterr()


def test_a_report_of_nothing(tmp_path, capsys):
    assert load("gpu_report").main([str(tmp_path)]) == 1
    assert "has no results of a benchmark" in capsys.readouterr().err
