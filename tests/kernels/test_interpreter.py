"""Runs every file of device/ in the interpreter, one process per file: this process may have loaded triton for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
AT_ONCE = 2  # each is one thread


def run_interpreted(name: str) -> subprocess.CompletedProcess:
    """pytest on one file of the folder, in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER / name)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """The runs of all files that were selected, under way."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    names = [item.callspec.params["name"] for item in here]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {name: pool.submit(run_interpreted, name) for name in names}
        yield runs
        for run in runs.values():
            run.cancel()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str, started: dict[str, Future]) -> None:
    done = started[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
