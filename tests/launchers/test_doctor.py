"""The doctor: every finding has a state, and what is wrong has a mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm import doctor
from megalm.doctor import Row, examine_machine, render

Megalm = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for torch on a machine without a GPU."""
    cuda = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None), __version__="2.13.0+cpu")
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def one(rows: Any, name: str) -> Row:
    return next(row for row in rows if row.name == name)


def test_command(megalm: Megalm) -> None:
    run = megalm("doctor", "output=json")
    rows = json.loads(run.stdout)
    assert {"megalm", "python", "torch", "deepspeed", "apex", "slurm", "network", "disk"} <= {row["name"] for row in rows}
    assert run.returncode == (1 if any(row["state"] == "missing" for row in rows) else 0)
    assert all(row["mend"] for row in rows if row["state"] != "ok" and "could not look" not in row["detail"])


def test_table_shows_the_mend() -> None:
    text = render([Row("a", "ok", "fine"), Row("bb", "missing", "gone", "pip install bb")])
    assert text.splitlines() == [
        "ok      a   fine",
        "missing bb  gone",
        "            -> pip install bb",
        "1 ok, 0 warn, 1 missing",
    ]


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    rows = list(doctor._packages())
    assert one(rows, "torch").state == "missing"
    assert one(rows, "wandb").state == "warn"
    assert one(rows, "torch").mend == "pip install torch"


def test_a_check_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, no_gpu: SimpleNamespace) -> None:
    def broken() -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_disk", broken)
    assert one(examine_machine(), "broken").detail == "could not look: OSError: no such thing"


def test_gpu_states(monkeypatch: pytest.MonkeyPatch, no_gpu: SimpleNamespace) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([]))
    assert one(doctor._devices(), "gpu").state == "ok"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    assert "built for CPU" in one(doctor._devices(), "gpu").detail
    no_gpu.version.cuda = "12.8"
    assert "CUDA does not start" in one(doctor._devices(), "gpu").detail


def test_a_gpu_is_described(no_gpu: SimpleNamespace) -> None:
    properties = SimpleNamespace(name="H200", total_memory=141 * 2**30, major=9, minor=0)
    no_gpu.cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda i: properties,
        nccl=SimpleNamespace(version=lambda: (2, 27, 3)),
    )
    rows = list(doctor._devices())
    assert one(rows, "gpu 0").detail == "H200, 141 GiB, sm_90"
    assert one(rows, "nccl").detail == "2.27.3"


@pytest.mark.parametrize(
    ("files", "modules", "state", "detail"),
    [
        (None, (), "ok", "absent"),
        (["__init__.py"], (), "warn", "another package"),
        (["normalization/fused_layer_norm.py", "optimizers/fused_adam.py"], (), "warn", "without its CUDA extensions"),
        (
            ["normalization/fused_layer_norm.py", "optimizers/fused_adam.py"],
            ("amp_C", "fused_layer_norm_cuda"),
            "ok",
            "with its CUDA extensions",
        ),
    ],
)
def test_apex_is_told_from_its_namesake(
    files: list[str] | None, modules: tuple, state: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files or []:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')")

    def find_spec(name: str) -> SimpleNamespace | None:
        if name == "apex" and files is not None:
            return SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        return SimpleNamespace() if name in modules else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    row = one(doctor._apex(), "apex")
    assert row.state == state
    assert detail in row.detail


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert one(doctor._network(), "network").mend == "unset GLOO_SOCKET_IFNAME"


def test_slurm_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "absent" in one(doctor._slurm(), "slurm").detail
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "inside job 7" in one(doctor._slurm(), "slurm").detail
    assert one(doctor._compiler(), "C compiler").state == "warn"


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    assert one(doctor._disk(), "disk").state == "warn"
    assert one(doctor._memory(), "shared memory").state == "warn"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "no permission" in one(doctor._disk(), "disk").detail


def test_triton_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert one(doctor._triton(), "triton kernels").state == "warn"


def test_nvme_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert {"g++", "ninja-build"} <= set(doctor.missing_for_nvme())
    row = one(doctor._nvme(), "nvme offload")
    assert row.state == "ok" and "g++" in row.detail
    monkeypatch.setattr(doctor, "missing_for_nvme", list)
    assert one(doctor._nvme(), "nvme offload").detail == "can be built at the first use"
