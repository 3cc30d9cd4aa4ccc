"""Looks at this machine: what megalm needs, what would make it faster, what is missing and what mends it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalm import __version__

REQUIRED = ("torch", "deepspeed", "numpy", "hydra-core", "omegaconf", "tokenizers", "safetensors", "tqdm")
OPTIONAL = ("triton", "wandb", "tensorboard")
_GIB = 2**30
_LEAST_DISK_GIB, _LEAST_SHM_GIB = 10, 1


@dataclass(frozen=True)
class Row:
    """One finding. `missing`: megalm cannot work; `warn`: slower, or not everywhere. `mend`: a command or a setting, which is
    a hint where the state is ok."""

    name: str
    state: str  # ok | warn | missing
    detail: str
    mend: str = ""


def examine_machine() -> list[Row]:
    """All findings. A check that itself fails becomes a row: a broken machine is what this is for."""
    checks: list[Callable[[], Iterator[Row]]] = [
        _python,
        _packages,
        _devices,
        _triton,
        _apex,
        _compiler,
        _nvme,
        _network,
        _slurm,
        _memory,
        _disk,
    ]
    rows: list[Row] = []
    for check in checks:
        try:
            rows += check()
        except Exception as error:
            rows.append(Row(check.__name__.strip("_"), "warn", f"could not look: {type(error).__name__}: {error}"))
    return rows


def render(rows: list[Row], output: str = "text") -> str:
    """The rows as a table, with the ways to mend below the row they belong to, or as JSON."""
    if output == "json":
        return json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:8}{row.name:{width}}  {row.detail}")
        lines += [f"{'':{width + 10}}-> {row.mend}"] * bool(row.mend)
    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in ("ok", "warn", "missing"))
    return "\n".join([*lines, counts])


def _python() -> Iterator[Row]:
    yield Row("megalm", "ok", f"{__version__} at {Path(__file__).parent}")
    version = platform.python_version()
    supported = sys.version_info >= (3, 10)
    yield Row(
        "python",
        "ok" if supported else "missing",
        f"{version} at {sys.executable}",
        "" if supported else "install Python 3.10 or newer",
    )


def _packages() -> Iterator[Row]:
    """By their metadata: importing all of them would take ten seconds."""
    for name in REQUIRED + OPTIONAL:
        try:
            yield Row(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "missing" if name in REQUIRED else "warn", "not installed", f"pip install {name}")


def _devices() -> Iterator[Row]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            detail = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, sm_{device.major}{device.minor}"
            yield Row(f"gpu {i}", "ok", detail)
        yield Row("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
        return
    hardware = list(Path("/dev").glob("nvidia[0-9]*"))
    if hardware and torch.version.cuda is None:
        mend = "pip install --force-reinstall torch"
        yield Row("gpu", "warn", f"{len(hardware)} found, but torch {torch.__version__} is built for CPU", mend)
    elif hardware:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Row(
            "gpu",
            "warn",
            f"{len(hardware)} found, but CUDA does not start (CUDA_VISIBLE_DEVICES={visible})",
            "nvidia-smi",
        )
    else:
        yield Row("gpu", "ok", "none: runs on the CPU, over gloo")


def _triton() -> Iterator[Row]:
    if importlib.util.find_spec("triton") is None:
        yield Row("triton kernels", "warn", "triton is not installed: the plain torch kernels are used", "pip install triton")
        return
    import torch

    from megalm_kernels.dispatch import triton_obstacle

    obstacle = triton_obstacle("cuda" if torch.cuda.is_available() else "cpu")
    yield Row("triton kernels", "ok", f"{obstacle}: the plain torch kernels are used" if obstacle else "can run here")


def _apex() -> Iterator[Row]:
    """Looked at, never imported: PyPI's package of that name is an old web toolkit."""
    from megalm_kernels.apex import find_apex  # loads torch

    apex = find_apex()
    if apex.state == "absent":
        yield Row("apex", "ok", "absent (optional: megalm's own kernels do its work)", apex.mend)
    else:
        yield Row("apex", "ok" if apex.state == "full" else "warn", apex.words, apex.mend)


def _compiler() -> Iterator[Row]:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler:
        yield Row("C compiler", "ok", compiler)
    else:
        yield Row("C compiler", "warn", "none: Triton cannot build its launchers", "apt-get install gcc")


def missing_for_nvme() -> list[str]:
    """Debian's names of what DeepSpeed needs to build its access to a disk (parallel.zero_offload=nvme), where it is absent."""
    header = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    parts = {"libaio-dev": header, "g++": shutil.which("c++") or shutil.which("g++"), "ninja-build": shutil.which("ninja")}
    return [name for name, present in parts.items() if not present]


def _nvme() -> Iterator[Row]:
    missing = missing_for_nvme()
    if missing:
        yield Row("nvme offload", "ok", f"not possible (optional: it needs {', '.join(missing)})")
    else:
        yield Row("nvme offload", "ok", "can be built at the first use")


def _network() -> Iterator[Row]:
    up = [name for _, name in socket.if_nameindex() if _is_up(name)]
    chosen = {
        name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA") if name in os.environ
    }
    detail = f"interfaces up: {', '.join(up) or 'none'}" + "".join(f"; {name}={value}" for name, value in chosen.items())
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = chosen.get(name, "").lstrip("^=").split(",")
        if any(part and not any(real.startswith(part) for real in up) for part in wanted):
            detail = f"{name}={chosen[name]} names no interface that is up ({', '.join(up)})"
            yield Row("network", "warn", detail, f"unset {name}")
            return
    yield Row("network", "ok" if up else "warn", detail, "" if up else "ip link set lo up")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        detail = f"{socket.gethostname()} does not resolve: gloo may hang"
        yield Row("host name", "warn", detail, "export GLOO_SOCKET_IFNAME=lo")
    fabrics = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Row("infiniband", "ok", ", ".join(fabrics) or "none")


def _is_up(interface: str) -> bool:
    path = Path("/sys/class/net", interface, "operstate")
    return not path.exists() or path.read_text().strip() in ("up", "unknown")  # a loopback says unknown


def _slurm() -> Iterator[Row]:
    sbatch = shutil.which("sbatch")
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        yield Row("slurm", "ok", f"inside job {job}, {os.environ.get('SLURM_NNODES', '1')} nodes")
    elif sbatch:
        run = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=10, check=False)
        yield Row("slurm", "ok", run.stdout.strip() or f"{sbatch}, but sinfo says: {run.stderr.strip()}")
    else:
        yield Row("slurm", "ok", "absent: runs start on this machine")


def _memory() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    yield Row("cpu", "ok", f"{cores} cores, {gib:.0f} GiB memory")
    if Path("/dev/shm").exists():
        free = shutil.disk_usage("/dev/shm").free / _GIB
        enough = free >= _LEAST_SHM_GIB
        mend = "" if enough else "in a container: --shm-size=8g or --ipc=host"
        yield Row("shared memory", "ok" if enough else "warn", f"{free:.1f} GiB free in /dev/shm (NCCL uses it)", mend)


def _disk() -> Iterator[Row]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / _GIB
    if not os.access(here, os.W_OK):
        mend = "set train.run_dir and prepare.output to folders of yours"
        yield Row("disk", "warn", f"no permission to write in {here}", mend)
    elif free < _LEAST_DISK_GIB:
        yield Row("disk", "warn", f"{free:.1f} GiB free in {here}", "set train.run_dir to a larger disk")
    else:
        yield Row("disk", "ok", f"{free:.0f} GiB free in {here}")
