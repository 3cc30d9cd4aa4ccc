"""From environment variables to a process group, and back out of it cleanly.

Started by torchrun, by srun or by our own launcher, a process finds its rank in the environment. The rendezvous store is
our own, with a prefix per attempt: torchrun reuses its store after a restart, and gloo then finds the dead attempt's
addresses there and fails ("Connection refused").
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalm.config.cluster import ClusterConfig
from megalm.errors import ConfigError, MegalmError, Problem, RunError
from megalm.parallel.heartbeat import start_heartbeat
from megalm.parallel.rendezvous import meet

_PORT_SECONDS = 10.0  # a port that was free a moment ago is waited for
_SETTLE_SECONDS = 0.3  # gloo's threads must let go of Python objects before the interpreter ends, or it aborts


@dataclass(frozen=True)
class Place:
    """Where this process stands, and where the rendezvous is."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    attempt: str
    store_is_served: bool  # another process (torchrun's agent) serves the store
    port_was_free: bool = False  # our launcher has chosen it for this start, and chooses another for the next


def find_place(environ: dict[str, str]) -> Place:
    """Read torchrun's variables (also set by our own launcher), else srun's, else: one process."""
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    counts = ("MEGALM_ATTEMPT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    attempt = next((environ[name] for name in counts if environ.get(name)), "0")
    if "RANK" in environ:
        missing = [k for k in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if k not in environ]
        if missing:
            rule = "a launcher that sets RANK must set WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too"
            what = f"{rule}; missing: {', '.join(missing)}"
            raise ConfigError(Problem("RANK", environ["RANK"], what, "", "unset RANK, or use torchrun"))
        rank, world, local = (int(environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        chosen = "MEGALM_LAUNCHER" in environ and "MEGALM_ATTEMPT" in environ
        return Place(rank, world, local, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), attempt, served, chosen)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        rank, world, local = (int(environ[k]) for k in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        address = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        port = int(environ.get("MASTER_PORT") or 20000 + int(environ["SLURM_JOB_ID"]) % 10000)
        return Place(rank, world, local, address, port, attempt, served)
    return Place(0, 1, 0, "127.0.0.1", 0, attempt, served)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `n[03-05,9],m1` -> `n03`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodelist)[0])


def start_process_group(config: ClusterConfig, settings: Mapping[str, Any] | None = None) -> torch.device:
    """Join the run's process group; returns this rank's device. `settings`, {key: value}, must be equal on all ranks.

    Raises RunError when the rendezvous fails, ConfigError when settings differ.
    """
    place = find_place(dict(os.environ))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed asserts it
    start_heartbeat()
    use_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = _find_gpu(place) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its device from there
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    timeout = timedelta(seconds=config.timeout_seconds)
    store = dist.PrefixStore(f"attempt-{place.attempt}", _open_store(place, timedelta(seconds=config.rendezvous_seconds)))
    if place.world_size > 1:
        meet(store, place.rank, place.world_size, settings or {}, config.rendezvous_seconds)
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    return device


def be_deterministic() -> None:
    """Let this process compute the same bits each time. Call before anything runs on a GPU; the environment's own values stay.

    cuBLAS adds up in a fixed order only with a workspace of its own for every stream (its documentation, "Results
    reproducibility"). NCCL's rings and trees add in a fixed order; NVLink SHARP (NVLS) adds in the switch, in an order that
    changes from call to call (NVIDIA/nccl, issue 1497). Our attention kernels repeat in any case, torch's by this setting.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _find_gpu(place: Place) -> torch.device:
    """This rank's GPU. Raises ConfigError where there is none for it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bound = count == 1 and "MEGALM_LAUNCHER" not in os.environ  # srun --gpus-per-task=1 shows each task only its own
    if place.local_rank >= count and not bound:
        rule = f"rank {place.rank} needs GPU {place.local_rank} of this machine, and torch sees {count}"
        raise ConfigError(Problem("cluster.device", "cuda", rule, "", "fewer processes per machine, or cluster.device=cpu"))
    return torch.device("cuda", 0 if bound else place.local_rank)


def _open_store(place: Place, timeout: timedelta) -> dist.Store:
    if place.world_size == 1:
        return dist.HashStore()
    serves = place.rank == 0 and not place.store_is_served
    deadline = time.monotonic() + min(_PORT_SECONDS, timeout.total_seconds())
    while True:
        try:
            return dist.TCPStore(
                place.address, place.port, place.world_size, is_master=serves, timeout=timeout, wait_for_workers=False
            )
        except dist.DistError as error:
            if serves and place.port_was_free and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise _no_store(place, serves, int(timeout.total_seconds()), str(error).splitlines()[0]) from error


def _no_store(place: Place, serves: bool, seconds: int, said: str) -> MegalmError:
    """Why this rank has no rendezvous. A user's mistake only where the user has named the port."""
    rule = "rank 0 must be able to listen there" if serves else "every rank must reach rank 0's rendezvous"
    fix = "cluster.port=0 (any free port), or another MASTER_PORT"
    if not serves:
        rule = f"rank 0 of {place.world_size} did not arrive within {seconds} s: {rule}"
        fix = "see in rank 0's log why it did not start; else the address, the port, and the firewall between the machines"
    problem = Problem("MASTER_ADDR:MASTER_PORT", f"{place.address}:{place.port}", f"{rule} ({said})", "", fix)
    return ConfigError(problem) if serves and not place.port_was_free else RunError(problem)


def stop_process_group() -> None:
    """Leave together. Without the pause gloo aborts now and then ("terminate called without an active exception")."""
    if dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "gloo" and dist.get_world_size() > 1:
            time.sleep(_SETTLE_SECONDS)
        dist.destroy_process_group()
