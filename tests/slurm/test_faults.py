"""Lost nodes, cut cables, hung ranks, preemption, spare nodes, chains: on a real SLURM, each half a minute or more."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from megalm.launchers.slurm import client
from tests.slurm.layouts import BY_RANK, TWO_BY_TWO

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]
WITH = {"rank": "", "agent": ", with agents"}


def ranks_of(run) -> list[int]:
    """Process numbers, as this machine sees them."""
    found = subprocess.run(["pgrep", "-f", f"megalm.launchers.pretrain .*{run.folder}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("launch", ["rank", "agent"])
@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_power_cut_costs_what_was_not_saved(node: str, launch: str, whole, make, cluster, fault) -> None:
    """n1 runs the batch script, n2 does not. The run goes on from its last checkpoint, on the nodes that are left."""
    run = make(f"power-{node}-{launch}")
    job = run.submit(*TWO_BY_TWO, f"slurm.launch={launch}")
    run.wait_for_step(60)
    cut = fault("node power cut", run.folder)
    cluster.tool("off", node)
    try:
        found = cluster.wait(job)
    finally:
        cluster.tool("on", node)
        cluster.wait_for_nodes()
    assert found["JobState"] == "COMPLETED", run.log()
    last = run.events("started")[-1]
    assert last["step"] == 50 and node not in last["hosts"]
    cut.note(f"back to the queue, on the nodes that are left{WITH[launch]}", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_a_missing_node(make, cluster, fault) -> None:
    """n2 is off, and the controller does not know it yet."""
    run = make("missing")
    missing = fault("missing node", run.folder)
    cluster.tool("off", "n2")
    try:
        job = run.submit("parallel=tp2", "slurm.nodes=2", BY_RANK, "train.steps=5", "optim.warmup_steps=1")
        found = cluster.wait(job)
    finally:
        cluster.tool("on", "n2")
        cluster.wait_for_nodes()
    assert found["JobState"] == "COMPLETED", run.log()
    assert "bad node n2: srun cannot reach it" in run.log() and "bad node n1" not in run.log()
    assert run.events("started")[-1]["hosts"] == ["n1", "n3"]
    missing.note("excluded, back to the queue")


def test_a_cut_cable(whole, make, cluster, fault) -> None:
    run = make("cable")
    job = run.submit(*TWO_BY_TWO, BY_RANK, "cluster.timeout_seconds=20")
    run.wait_for_step(60)
    cut = fault("cut cable", run.folder)
    cluster.tool("unplug", "n2")
    try:
        found = cluster.wait(job)
    finally:
        cluster.tool("plug", "n2")
        cluster.wait_for_nodes()
    assert found["JobState"] == "COMPLETED", run.log()
    cut.note("back to the queue, on the nodes that are left", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_a_hung_rank_is_found(whole, make, cluster, fault) -> None:
    """One task per rank has no agent: the supervisor misses the steps, asks for stacks, and starts again."""
    run = make("hung")
    job = run.submit(*TWO_BY_TWO, BY_RANK, "cluster.stall_seconds=15")
    run.wait_for_step(60)
    stop = fault("stopped rank", run.folder)
    os.kill(ranks_of(run)[-1], signal.SIGSTOP)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert run.events("stalled")[0]["step"] >= 60
    assert "rank-" in run.log().split("in a call that does not end: ")[1].split()[0], "the stopped one is named"
    assert len([path for path in (run.folder / "logs").glob("*.0/stacks-rank-*.txt") if path.stat().st_size]) == 3
    stop.note("a job without agents, stall_seconds=15: back to the queue", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_a_killed_rank_is_restarted_in_place(whole, make, cluster, fault) -> None:
    """By the agents: the job never leaves its nodes."""
    run = make("killed")
    job = run.submit(*TWO_BY_TWO, "cluster.max_restarts=2")
    run.wait_for_step(60)
    kill = fault("killed rank", run.folder)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), run.log()
    assert [event["attempt"] for event in run.events("started")] == ["0.0", "0.1"]
    kill.note("a job on two nodes: restarted in place", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_an_agent_that_is_killed_takes_the_start_with_it(whole, make, cluster, fault) -> None:
    """No rank is left behind on the node; the job goes back to the queue."""
    run = make("agent")
    job = run.submit(*TWO_BY_TWO)
    run.wait_for_step(60)
    before = ranks_of(run)
    (agent,) = subprocess.run(
        ["pgrep", "-f", f"megalm.launchers.agent --nodes 2 --node 1 .*{run.folder}"], capture_output=True, text=True
    ).stdout.split()
    kill = fault("killed agent", run.folder)
    os.kill(int(agent), signal.SIGKILL)
    run.wait_for(lambda: not [pid for pid in before if Path(f"/proc/{pid}/cmdline").exists()], 30)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), run.log()
    kill.note("its ranks end with it; back to the queue", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


@pytest.mark.parametrize("launch", ["rank", "agent"])
def test_preempted_it_gives_way_and_comes_back(launch: str, whole, make, cluster, fault) -> None:
    run = make(f"preempted-{launch}")
    job = run.submit(*TWO_BY_TWO, f"slurm.launch={launch}", "slurm.partition=train", "slurm.extra=['--exclusive']")
    run.wait_for_step(60)
    preemption = fault("preemption signal", run.folder)
    urgent = subprocess.run(
        ["sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert run.events("started")[-1]["step"] % 50, "saved where it was"
    preemption.note(f"saved at that step, gives way, comes back{WITH[launch]}", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_cancelled_it_stays_so(make, cluster) -> None:
    run = make("cancelled")
    job = run.submit(*TWO_BY_TWO, BY_RANK)
    run.wait_for_step(10)
    subprocess.run(["scancel", job], check=True)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    run.wait_for(lambda: run.events("saved"), 30)
    assert not run.events("requeued")


def test_a_spare_node_takes_over_at_once(make, cluster, shared: Path, fault) -> None:
    cluster.tool("exec", "n2", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(shared))
    try:
        run = make("spare")
        bad = fault("bad node", run.folder)
        job = run.submit("parallel=tp2", "slurm.nodes=2", "slurm.spares=1", BY_RANK, "train.steps=5", "optim.warmup_steps=1")
        found = cluster.wait(job)
    finally:
        cluster.tool("exec", "n2", "umount", str(shared))
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), run.log()
    assert run.events("started")[0]["hosts"] == ["n1", "n3"]
    bad.note("a spare node takes over")


def test_a_chain_where_requeue_is_off(whole, make, cluster) -> None:
    """Two jobs of one name, one after the other; the second goes on where the first has saved."""
    run = make("chain")
    first = run.submit(*TWO_BY_TWO, BY_RANK, "slurm.requeue=false", "slurm.chain=2", "slurm.job_name=chain")
    run.wait_for_step(60)
    assert client.state_of(str(int(first) + 1)) == "PENDING"
    subprocess.run(["scancel", "--batch", "--signal=USR1", first], check=True)
    assert cluster.wait(first)["ExitCode"] == "75:0"
    assert cluster.wait(str(int(first) + 1))["JobState"] == "COMPLETED", run.log()
    assert run.losses() == whole.losses()


def test_two_jobs_on_one_run(make, cluster) -> None:
    """The second is refused when it is submitted, and, submitted by hand, when it starts."""
    run = make("twice")
    job = run.submit(*TWO_BY_TWO, BY_RANK)
    run.wait_for_step(5)
    with pytest.raises(AssertionError, match=f"another job writes this run: job {job}"):
        run.submit(*TWO_BY_TWO, BY_RANK)
    again = ["sbatch", "--parsable", str(run.folder / "job.sh")]
    by_hand = subprocess.run(again, capture_output=True, text=True, check=True).stdout.strip()
    found = cluster.wait(by_hand)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert f"another job writes this run: job {job}" in run.log()
    subprocess.run(["scancel", job], check=True)
