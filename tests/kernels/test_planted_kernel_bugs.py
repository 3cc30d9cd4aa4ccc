"""The tests of the kernels turn red, and say why, when a kernel is wrong: bugs planted in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "megalm_kernels"


@dataclass(frozen=True)
class Bug:
    """In device/FILE, `before` becomes `after`; the tests in test_FILE (or in `tests`) that `chosen` selects must see it."""

    file: str
    before: str
    after: str
    chosen: str
    words: str  # that the failure says
    tests: str = ""


BUGS = {
    "int32 index": Bug(
        "activations",
        "    row = (tl.program_id(0) // blocks).to(tl.int64)\n",
        "    row = tl.program_id(0) // blocks\n",
        "test_addresses_are_int64 and gated_rows",
        "gated_rows: died or erred beyond 2^31 elements: is an address computed in int32?",
        "test_int64.py",
    ),
    "int32 index of the loss": Bug(
        "cross_entropy",
        "    row = tl.program_id(0).to(tl.int64)\n",
        "    row = tl.program_id(0)\n",
        "test_memory_beyond_int32",
        "exit -11",
    ),
    "wrong gradient of an input": Bug(
        "activations",
        "dy * up * _slope(gate, share, GELU), dy * gate * share",
        "dy * up * _slope(gate, share, GELU), dy * gate",
        "test_gated and float32 and shape2 and swiglu",
        "gradient 1: off by",
    ),
    "wrong gradient of a weight": Bug(
        "norms",
        "        dweight += grad * normed\n",
        "        dweight += grad * normed * scale[:, None]\n",
        "test_against_fp64 and rms_norm and plain and float32",
        "gradient 1: off by",
    ),
    "wrong gradient of the loss": Bug(
        "cross_entropy",
        "    of_label = grad * (1.0 - smoothing)\n",
        "    of_label = grad\n",
        "test_losses_and_gradient and float32 and label_smoothing and 11-48 and not z_loss",
        "gradient 0: off by",
    ),
}


def run_tests(bug: Bug, kernels: Path) -> subprocess.CompletedProcess:
    """The selected tests in the interpreter, in a process that takes megalm_kernels from the folder `kernels`."""
    tests = ROOT / "tests" / "kernels" / "device" / (bug.tests or f"test_{bug.file}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", bug.chosen, str(tests)]
    command += ["-o", f"pythonpath={kernels} {ROOT}", f"--rootdir={ROOT}"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(kernels)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)


GATE = """
from megalm_kernels.compile_gate import run_gate
report = run_gate([90], ["swiglu"])
print(*report.failures, sep="\\n")
raise SystemExit(bool(report.failures))
"""


def copy_with(path: Path, file: str, before: str, after: str) -> None:
    """A copy of the package in the folder `path`, in which `before` has become `after`."""
    shutil.copytree(PACKAGE, path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (path / PACKAGE.name / file).read_text()
    assert before in source, f"{file} has changed: plant this bug in another place"
    (path / PACKAGE.name / file).write_text(source.replace(before, after))


@pytest.mark.slow
def test_a_planted_spill_is_seen(tmp_path: Path) -> None:
    before = '_table("gated", [Row(2, dict(BLOCK=2048, num_warps=4))'
    copy_with(tmp_path, "tables.py", before, before.replace("BLOCK=2048, num_warps=4", "BLOCK=16384, num_warps=1"))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", GATE], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "sm_90 swiglu torch.bfloat16: _gated" in done.stdout and "spills registers" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_seen(bug: Bug, tmp_path: Path) -> None:
    copy_with(tmp_path, f"device/{bug.file}.py", bug.before, bug.after)
    done = run_tests(bug, tmp_path)
    assert done.returncode == 1, f"the tests passed, or did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert bug.words in done.stdout, done.stdout[-3000:]
