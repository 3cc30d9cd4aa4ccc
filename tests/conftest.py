"""Tests that need a machine which is not here are skipped, and say why; those that take long wait to be asked for.

Every process gets one CPU thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tools.draw_reliability import Fault

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that spin for each other on few cores cost minutes


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_slurm() -> bool:
    """A cluster, or what it takes to start one of namespaces. MEGALM_REQUIRE_SLURM: where neither is, the tests fail."""
    if "SLURM_CONF" in os.environ or "MEGALM_REQUIRE_SLURM" in os.environ:
        return True
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch"))


NEEDS = {
    "gpu": (_has_gpu, "no CUDA device"),
    "slurm": (_has_slurm, "no SLURM: SLURM_CONF is not set, and to start a cluster needs root, slurmctld, slurmd and munge"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "matrix" not in config.option.markexpr:
        asked = [item for item in items if not item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("matrix")])
        items[:] = asked
    if "slurm" not in config.option.markexpr:  # lost nodes and the like, half a minute or more each
        faults = [item for item in items if item.get_closest_marker("slurm") and item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=faults)
        items[:] = [item for item in items if item not in faults]
    for marker, (is_there, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str, Path], Any]:
    """Call `fault(name, run_dir)` just before making it and `.note(outcome)` after: a line of docs/reliability.md.

    Names are the keys of FAULTS in tools/draw_reliability.py. Lines are kept where MEGALM_RELIABILITY names a folder.
    """
    return partial(Fault, source=request.node.nodeid.partition("[")[0])


@pytest.fixture
def pretend_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to run the operators that stand for Triton kernels, by their plain bodies: what they save is the same."""

    def pretend() -> None:
        from megalm_kernels import Choice, dispatch

        dispatch.choose("torch", "cpu")
        for name, has in dispatch._registry.items():
            if "triton" in has:
                choice = (has["triton"].function, Choice(name, "triton", "pretended"))
                monkeypatch.setitem(dispatch._chosen, name, choice)

    return pretend
