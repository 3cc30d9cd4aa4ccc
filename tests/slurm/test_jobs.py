"""Jobs on a real SLURM: over two nodes, stopped and continued, on nodes that are bad or lost, and in a loop of crashes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.launchers.slurm import history
from tests.slurm.layouts import BY_RANK, TWO_BY_TWO

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
Make = Callable[[str], "object"]


def test_two_nodes_train_one_model(whole) -> None:
    """tp2 x pp2 over two nodes: four ranks, their logs, the marks of a finished run; the job itself is COMPLETED."""
    (started,) = whole.events("started")
    assert (started["ranks"], started["hosts"], started["attempt"]) == (4, ["n1", "n2"], "0.0")
    losses = whole.losses()
    assert [step for step, _ in losses] == list(range(1, 151))
    assert losses[-1][1] < losses[0][1] - 1
    assert (whole.folder / "finished").exists() and "finished: the job ends" in whole.log()
    (logs,) = (whole.folder / "logs").glob("*.0")
    assert {path.name for path in logs.glob("*.log")} >= {"node-0.log", "node-1.log", "rank-1.log", "rank-3.log"}


@pytest.mark.parametrize("launch", ["agent", pytest.param("rank", marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_and_goes_on_to_the_last_bit(launch: str, whole, make, cluster) -> None:
    """USR1, as SLURM sends it before the time limit: saved at that step, back in the queue, not one loss differs."""
    run = make(f"stopped-{launch}")
    job = run.submit(*TWO_BY_TWO, f"slurm.launch={launch}")
    run.wait_for_step(60)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), run.log()
    first, second = run.events("started")
    assert 60 <= second["step"] < 150 and second["step"] % 50, "it saved where it was, not where it would have"
    assert (first["attempt"], second["attempt"]) == ("0.0", "1.0")
    assert run.losses() == whole.losses()
    assert history.read_history(run.folder, _submission(run)).failures == 0


def test_a_bad_node_is_named_and_stays_left_out(make, cluster, shared: Path, fault) -> None:
    """n2 does not see the shared disk: it is excluded, which only a job that is back in the queue can be told.

    It is well again before the next start, and is not asked: the start after that has the other two nodes once more.
    """
    run = make("bad")
    bad = fault("bad node", run.folder)
    cluster.tool("exec", "n2", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(shared))
    try:
        job = run.submit("parallel=tp2", "slurm.nodes=2", BY_RANK)
        run.wait_for(lambda: run.events("excluded"))
    finally:
        cluster.tool("exec", "n2", "umount", str(shared))
    run.wait_for_step(60)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"], found["ExcNodeList"]) == ("COMPLETED", "2", "n2"), run.log()
    assert "bad node n2: train.run_dir" in run.log()
    assert [event["nodes"] for event in run.events("excluded")] == [["n2"]]
    assert [(event["attempt"], event["hosts"]) for event in run.events("started")] == [
        ("1.0", ["n1", "n3"]), ("2.0", ["n1", "n3"]),
    ]  # fmt: skip
    bad.note("excluded for good, back to the queue")


def test_a_loop_of_crashes_stops(make, cluster, shared: Path, fault) -> None:
    """Two failed starts without a checkpoint, as asked, and not one more."""
    setup = shared / "crash.sh"
    setup.write_text('[ -z "${MEGALM_TOKEN:-}" ] || exit 7 # in the tasks, not in the batch script\n')
    run = make("crashes")
    crashes = fault("crash loop", run.folder)
    job = run.submit(BY_RANK, f"slurm.setup={setup}", "slurm.max_failures=2")
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "1", "1:0"), run.log()
    assert "2 failed starts in a row without a new checkpoint: the job ends" in run.log()
    assert [event["kind"] for event in run.events("gave_up")] == ["gave_up"]
    crashes.note("the job ends after slurm.max_failures=2 starts", by="gave_up")


def _submission(run) -> str:
    (path,) = (run.folder / "slurm").glob("history-*.json")
    return path.stem.partition("-")[2]
