"""GPUs and launchers are seen without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.machine import count_gpus, data_parallel, launched_processes, processes, uses_cuda
from megalm.config.run import RunConfig


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("0", 1), ("0,1,2", 3), ("-1", 0), ("0,-1,2", 1), ("GPU-a,GPU-b", 2), ("NoDevFiles", 0)],
)
def test_visible_devices(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def test_device_files_count_where_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0"), Path("/dev/nvidia1")]))
    assert count_gpus() == 2


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_processes() == 0
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launched_processes() == 0
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert launched_processes() == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_processes() == 8  # a stray WORLD_SIZE without RANK means nothing
    monkeypatch.setenv("RANK", "0")
    assert launched_processes() == 4


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig()
    config.parallel.tensor_parallel = 2
    assert (processes(config), data_parallel(config), uses_cuda(config)) == (2, 1, False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert (processes(config), data_parallel(config), uses_cuda(config)) == (4, 2, True)
    config.cluster.device = "cpu"
    assert processes(config) == 2
    config.cluster.num_processes = 6
    assert processes(config) == 6
