"""Ranks that do not come, and configs that are not one: said on every rank, by name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megalm.config.cluster import ClusterConfig
from megalm.errors import ConfigError, MegalmError, RunError
from megalm.parallel import bootstrap, rendezvous
from megalm.parallel.rendezvous import meet, spans
from megalm.testing import run_distributed

SETTINGS = {"optim.lr": 3e-4, "model.hidden_size": 128, "parity.layouts": ["tp2"]}


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "3"), ([3, 7], "3, 7"), ([4, 1, 2, 3, 9], "1-4, 9"), ([0, 1], "0-1"), ([], "")]
)
def test_spans(ranks: list[int], text: str) -> None:
    assert spans(ranks) == text


def outcomes(world_size: int, settings_of: dict[int, dict], seconds: float = 0.3) -> dict[int, MegalmError | None]:
    """What `meet` gives each rank that comes; ranks are threads with a store in common."""
    store, found = dist.HashStore(), dict[int, MegalmError | None]()

    def come(rank: int) -> None:
        try:
            meet(store, rank, world_size, settings_of[rank], seconds)
            found[rank] = None
        except MegalmError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in settings_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_equal_configs_meet() -> None:
    assert outcomes(3, dict.fromkeys(range(3), SETTINGS)) == {0: None, 1: None, 2: None}


def test_missing_ranks_are_named_on_every_rank() -> None:
    found = outcomes(8, dict.fromkeys((0, 1, 2, 4, 5, 6), SETTINGS))
    assert set(found) == {0, 1, 2, 4, 5, 6}
    for error in found.values():
        assert isinstance(error, RunError)
        (problem,) = error.problems
        assert problem.rule == "ranks 3, 7 of 8 did not arrive within 0.3 s"
        assert problem.key == "cluster.rendezvous_seconds" and "cluster.rendezvous_seconds" in problem.fix


def test_rank_0_missing_while_another_process_serves_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent holds the store: the others see that rank 0 is not there."""
    monkeypatch.setattr(rendezvous, "_MARGIN_SECONDS", 0.1)
    found = outcomes(3, {1: SETTINGS, 2: SETTINGS})
    assert ["rank 0 of 3 did not arrive" in str(error) for error in found.values()] == [True, True]


def test_differing_keys_are_named_with_values_and_ranks() -> None:
    other = SETTINGS | {"optim.lr": 1e-4}
    found = outcomes(5, {0: SETTINGS, 1: other, 2: SETTINGS, 3: other, 4: other | {"parity.layouts": ["pp2"], "extra": 1}})
    assert len(found) == 5
    for error in found.values():
        assert isinstance(error, ConfigError)
        said = {problem.key: problem.value for problem in error.problems}
        assert said == {
            "optim.lr": "0.0003 on rank 0, 0.0001 on ranks 1, 3-4",
            "parity.layouts": "['tp2'] on rank 0, ['pp2'] on rank 4",
            "extra": "None on rank 0, 1 on rank 4",
        }


class LostStore:
    """A store whose server has gone."""

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Connection reset by peer\nwhere it happened")


def test_a_store_that_goes_away_is_named() -> None:
    with pytest.raises(RunError, match=r"rank 0 left during the rendezvous \(Connection reset by peer\)"):
        meet(LostStore(), 1, 2, SETTINGS, 1.0)  # type: ignore[arg-type]


def test_rank_0_may_leave_after_its_verdict() -> None:
    """A rank that has read what is wrong need not say so to a store that is gone."""
    rendezvous._take_leave(LostStore(), 1, [])  # type: ignore[arg-type]


# --- real processes ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _come_without_rank_1(rank: int, world_size: int, port: int) -> str:
    """Ranks 0 and 2 of 3."""
    mine = 2 * rank
    store = bootstrap._open_store(bootstrap.Place(mine, 3, mine, "127.0.0.1", port, "0", False), timedelta(seconds=30))
    try:
        meet(store, mine, 3, SETTINGS, 1.0)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_processes_that_wait_for_a_missing_one_all_name_it() -> None:
    for text in run_distributed(_come_without_rank_1, 2, free_port()):
        assert "rank 1 of 3 did not arrive within 1 s" in text


def test_the_time_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**place, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MEGALM_LAUNCHER", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    with pytest.raises(RunError, match="rank 1 of 2 did not arrive within 1 s"):
        bootstrap.start_process_group(ClusterConfig(device="cpu", rendezvous_seconds=1, timeout_seconds=600))
    assert time.monotonic() - begin < 30


JOIN = """
import sys
from megalm.config.cluster import ClusterConfig
from megalm.errors import MegalmError
from megalm.parallel.bootstrap import start_process_group
try:
    start_process_group(ClusterConfig(device="cpu"), {"optim.lr": sys.argv[1]})
except MegalmError as error:
    print(error)
"""


@pytest.mark.dist
def test_processes_with_two_configs_all_name_the_difference() -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environ = {k: v for k, v in os.environ.items() if k not in ("MEGALM_LAUNCHER", "TORCHELASTIC_USE_AGENT_STORE")}
    ranks = []
    for rank in ("0", "1"):
        mine = {**environ, **place, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", JOIN, f"0.{rank}"]
        ranks.append(subprocess.Popen(command, env=mine, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for process in ranks:
        out, err = process.communicate(timeout=90)
        assert "optim.lr = 0.0 on rank 0, 0.1 on rank 1" in out and "all ranks must run with one config" in out, err
