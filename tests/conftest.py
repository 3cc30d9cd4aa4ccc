"""Tests that need a machine which is not here are skipped, and say why; those that take an hour wait to be asked for.

Every process gets one CPU thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that spin for each other on few cores cost minutes


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


NEEDS = {
    "gpu": (_has_gpu, "no CUDA device"),
    "slurm": (lambda: shutil.which("sbatch") is not None, "no SLURM here"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "matrix" not in config.option.markexpr:
        asked = [item for item in items if not item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("matrix")])
        items[:] = asked
    for marker, (is_there, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


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
