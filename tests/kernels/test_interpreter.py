"""Runs every file of device/ in the interpreter, one process per file: this process may have loaded triton for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run_interpreted(path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """pytest on `path` in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, str(path)]
    env = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str) -> None:
    done = run_interpreted(FOLDER / name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
