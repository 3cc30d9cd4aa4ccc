"""Finding one's place from the environment, and a rendezvous that says what is wrong with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megalm.config.cluster import ClusterConfig
from megalm.errors import ConfigError, RunError
from megalm.parallel import bootstrap
from megalm.parallel.bootstrap import Place, find_place, first_host, start_process_group, stop_process_group

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-7",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
}


def test_place_from_torchrun():
    assert find_place(TORCHRUN) == Place(5, 8, 1, "node-7", 29400, "2", True)


def test_place_from_our_own_launcher():
    environ = {k: v for k, v in TORCHRUN.items() if not k.startswith("TORCHELASTIC")}
    assert find_place(environ) == Place(5, 8, 1, "node-7", 29400, "0", False)


def test_torchrun_inside_a_slurm_step_wins():
    assert find_place({**SRUN, **TORCHRUN}).rank == 5


def test_place_from_srun():
    assert find_place(SRUN) == Place(3, 4, 1, "gpu07", 20000 + 1234567 % 10000, "0", False)


def test_srun_takes_the_address_and_port_of_the_batch_script():
    place = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "41000", "SLURM_RESTART_COUNT": "1"})
    assert (place.address, place.port, place.attempt) == ("10.0.0.1", 41000, "1")


@pytest.mark.parametrize("environ", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}], ids=["bare", "one task"])
def test_place_of_a_process_alone(environ):
    assert find_place(environ) == Place(0, 1, 0, "127.0.0.1", 0, "0", False)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n03", "n03"),
        ("n[03-05,9],m1", "n03"),
        ("n[1,4-6]", "n1"),
        ("a-b,c", "a-b"),
        ("rack[2-3]n[10-12]", "rack2n10"),
        ("gpu-[001-128].cluster", "gpu-001.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


# --- the rendezvous ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def one_process(monkeypatch):
    for name in (*TORCHRUN, *SRUN, "MEGALM_LAUNCHER", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # start_process_group sets both for good; here they are put back
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_process_needs_no_network(one_process):
    assert start_process_group(ClusterConfig(device="cpu")) == torch.device("cpu")
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
    stop_process_group()
    assert not dist.is_initialized()
    stop_process_group()  # a second time: nothing to do


def test_deepspeeds_variable_is_set(one_process):
    one_process.delenv("LOCAL_RANK")
    start_process_group(ClusterConfig(device="cpu"))
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_restarted_attempt_does_not_see_the_last_ones_keys(one_process):
    """torchrun keeps its store over restarts: without the prefix, gloo would read the dead attempt's addresses."""
    kept = dist.HashStore()
    one_process.setattr(bootstrap, "_open_store", lambda place, timeout: kept)
    for attempt in ("0", "1"):
        one_process.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        start_process_group(ClusterConfig(device="cpu"))
        store = dist.distributed_c10d._get_default_store()
        assert not store.check(["who"]), f"attempt {attempt} sees an older attempt's key"
        store.set("who", attempt)
        stop_process_group()


def test_a_port_in_use_is_named_on_rank_0():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place(0, 2, 0, "127.0.0.1", taken.getsockname()[1], "0", False)
        with pytest.raises(ConfigError, match="rank 0 must be able to listen there") as caught:
            bootstrap._open_store(place, timedelta(seconds=2))
    problem = caught.value.problems[0]
    assert problem.value == f"127.0.0.1:{place.port}" and "cluster.port=0" in problem.fix


def test_a_port_that_our_launcher_has_chosen_is_waited_for(monkeypatch):
    """The start before may still hold it. That it is not free is no mistake of the user's: the next start gets another."""
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert not find_place(environ).port_was_free
    place = find_place({**environ, "MEGALM_LAUNCHER": "logs", "MEGALM_ATTEMPT": "0.0"})
    assert place.port_was_free
    taken = socket.create_server(("127.0.0.1", 0))
    place = replace(place, port=taken.getsockname()[1])
    with pytest.raises(RunError, match="rank 0 must be able to listen there"):
        bootstrap._open_store(place, timedelta(seconds=0.5))
    threading.Timer(0.5, taken.close).start()
    monkeypatch.setattr(bootstrap, "_PORT_SECONDS", 60.0)
    assert bootstrap._open_store(place, timedelta(seconds=60)).port == place.port


def test_nobody_listening_is_named_on_the_other_ranks():
    place = Place(1, 2, 1, "127.0.0.1", free_port(), "0", False)
    with pytest.raises(RunError, match="rank 0 of 2 did not arrive within 1 s: every rank must reach rank 0's rendezvous"):
        bootstrap._open_store(place, timedelta(seconds=1))


def test_a_served_store_is_joined_not_opened():
    """Under torchrun the agent listens on the port; rank 0 must not try to."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = bootstrap._open_store(Place(0, 2, 0, "127.0.0.1", agent.port, "0", True), timedelta(seconds=5))
    agent.set("from", "agent")
    assert store.get("from") == b"agent"


JOIN = """
import torch, torch.distributed as dist
from megalm.config.cluster import ClusterConfig
from megalm.parallel.bootstrap import start_process_group, stop_process_group
start_process_group(ClusterConfig(device="cpu", timeout_seconds=30))
x = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(x)
stop_process_group()
print(int(x))
"""


@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_meet_and_leave_cleanly(launcher):
    port = free_port()
    environ = {k: v for k, v in os.environ.items() if k not in (*TORCHRUN, *SRUN)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        if launcher == "srun":
            mine = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2",
                    "SLURM_STEP_NODELIST": "here", "SLURM_JOB_ID": "1"}  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen([sys.executable, "-c", JOIN], env={**environ, **mine}, text=True, **pipes))
    for process in ranks:
        out, err = process.communicate(timeout=90)
        assert (process.returncode, out.strip()) == (0, "3"), err


def test_a_launcher_that_sets_half_of_the_variables_is_named():
    with pytest.raises(ConfigError, match="missing: LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("local_rank", "gpus", "launcher", "index"),
    [(1, 2, True, 1), (3, 1, False, 0), (0, 1, True, 0), (1, 1, True, None), (2, 2, False, None), (0, 0, False, None)],
)
def test_each_rank_finds_its_gpu(local_rank, gpus, launcher, index, monkeypatch):
    """srun may show each task its own GPU only; any other shortage is an error, not a shared GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("MEGALM_LAUNCHER", raising=False)
    if launcher:
        monkeypatch.setenv("MEGALM_LAUNCHER", "logs")
    place = Place(local_rank, 4, local_rank, "127.0.0.1", 1, "0", False)
    if index is None:
        with pytest.raises(ConfigError, match=f"torch sees {gpus}"):
            bootstrap._find_gpu(place)
    else:
        assert bootstrap._find_gpu(place) == torch.device("cuda", index)


def test_the_deterministic_mode_leaves_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        bootstrap.be_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_NVLS_ENABLE"]) == (":16:8", "0")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        bootstrap.be_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
            os.environ.pop(name, None)
