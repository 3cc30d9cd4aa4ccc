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
    """In device/FILE (or FOLDER/FILE), `before` becomes `after`; the tests in test_FILE (or in `tests`) that `chosen` selects
    must see it."""

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
    "attention forgets the maximum of a merge": Bug(
        "attention/merge",
        "largest = lses.detach().amax(0)",
        "largest = torch.zeros_like(lses[0])",
        "test_parts_over_the_keys and large",
        "output 0: ",
        "test_attention_features.py",
    ),
    "attention sees one key too many at the edge of a tile": Bug(
        "attention_tiles",
        "end_full = min(keys, max(place + right + 1, 0))",
        "end_full = min(keys, max(place + right + 2, 0))",
        "test_lengths and 20 and causal",
        "output 0: off by",
        "test_attention.py",
    ),
    "attention's gradient of k lacks the scale": Bug(
        "attention_backward",
        "(dk * scale).to(",
        "dk.to(",
        "test_lengths and 7 and causal",
        "gradient 1: off by",
        "test_attention.py",
    ),
    "attention's gradient of k is of the first head of a group": Bug(
        "attention_backward",
        " * groups):\n",
        "):\n",
        "test_heads and groups",
        "gradient 1: off by",
        "test_attention.py",
    ),
    "attention's backward drops other shares": Bug(
        "attention_backward",
        "keeps(queries_at, columns_at,",
        "keeps(columns_at, queries_at,",
        "test_dropout_is_that_of and 0.5",
        "the backward drops other shares",
        "test_attention_features.py",
    ),
    "attention's backward leaves delta out": Bug(
        "attention_backward",
        "ds = share * (dshare - delta)",
        "ds = share * dshare",
        "test_lengths and 7 and causal",
        "gradient 0: off by",
        "test_attention.py",
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
    file = bug.file if "/" in bug.file else f"device/{bug.file}"
    copy_with(tmp_path, f"{file}.py", bug.before, bug.after)
    done = run_tests(bug, tmp_path)
    assert done.returncode == 1, f"the tests passed, or did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert bug.words in done.stdout, done.stdout[-3000:]
