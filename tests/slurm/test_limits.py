"""What ends a start without being a fault of it: the time limit itself, a full disk, a damaged checkpoint; and job arrays."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.layouts import BY_RANK, TWO_BY_TWO

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]


def test_the_time_limit_itself(whole, make, cluster, fault) -> None:
    """Nobody but slurmctld sends a signal: as often as needed saved, back to the queue, continued, to the last bit.

    It looks every 30 s and signals 45 to 75 s after a start; the run is made long enough for that on this machine.
    """
    times = [record["time"] for record in whole.records()]
    steps = f"train.steps={max(300, round(80 * len(times) / (times[-1] - times[0])))}"
    unbroken, run = make("unlimited"), make("limited")
    found = cluster.wait(unbroken.submit(*TWO_BY_TWO, steps))
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), unbroken.log()
    limit = fault("time limit", run.folder)
    job = run.submit(*TWO_BY_TWO, steps, "slurm.minutes=2", "slurm.save_seconds=45", "slurm.max_starts=20")
    found = cluster.wait(job, 1200)
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1, run.log()
    assert found["TimeLimit"] == "00:02:00"
    asked, heard = run.events("stopping")[:2]
    assert asked["job"] == job and "step" in heard
    ends = [event["time"] for event in run.events("requeued")]
    begins = [event["time"] for event in run.events("started")]
    assert ends[0] - begins[0] < 120, "back in the queue before the limit"
    first = [event["step"] for event in run.events("started")]
    assert first == sorted(first) and first[1] == heard["step"] > 0, "it went on where it was asked to stop"
    limit.began, limit.step = math.nextafter(asked["time"], math.inf), heard["step"]
    limit.note("saved at that step, back to the queue", run.losses() == unbroken.losses())
    assert run.losses() == unbroken.losses()


def test_the_elements_of_an_array_come_back_each_for_itself(make, cluster, tmp_path: Path) -> None:
    """The last element's number is the array's own: only that element is asked to stop, and only it is requeued."""
    runs = [make("array-1"), make("array-2")]
    settings = {**runs[0].settings, "train.run_dir": str(runs[0].folder)[:-1] + "$SLURM_ARRAY_TASK_ID"}
    words = " ".join(f'"{key}={value}"' for key, value in settings.items())
    script = tmp_path / "array.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --array=1-2 --nodes=1 --time=60 --signal=B:USR1@60 --requeue --open-mode=append\n"
        f"#SBATCH --output={tmp_path}/%a.out\n"
        f"exec bash {ROOT}/slurm/run.sbatch pretrain {words} {BY_RANK} parallel=tp2\n"
    )
    environ = {**os.environ, "PYTHON": sys.executable, "MEGALM_ENV": str(ROOT / "slurm" / "env.sh")}
    done = subprocess.run(["sbatch", "--parsable", str(script)], env=environ, capture_output=True, text=True, check=True)
    array = done.stdout.strip()
    runs[1].wait_for_step(60)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_2"], check=True)
    found = [cluster.wait(f"{array}_{number}") for number in (1, 2)]
    said = [(tmp_path / f"{number}.out").read_text() for number in (1, 2)]
    assert found[1]["JobId"] == array, "the trap is there"
    assert [(job["JobState"], job["Restarts"]) for job in found] == [("COMPLETED", "0"), ("COMPLETED", "1")], said
    assert runs[1].losses() == runs[0].losses()


def test_a_full_disk(whole, make, cluster, fault) -> None:
    """A checkpoint finds no room: the job says where, keeps the one before, and goes on from it when there is room again."""
    run = make("full")
    disk = run.folder / "checkpoints"
    disk.mkdir(parents=True)
    cluster.tool("exec", "n1", "mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk))
    try:
        job = run.submit("parallel=tp2_pp2", BY_RANK, "slurm.extra=['--nodelist=n1']")
        run.wait_for_step(55)
        full = fault("full disk", run.folder)
        cluster.tool("exec", "n1", "bash", "-c", f"cat /dev/zero > {disk}/fill 2>/dev/null; true")
        run.wait_for(lambda: run.events("requeued"))
        cluster.tool("exec", "n1", "rm", str(disk / "fill"))
        found = cluster.wait(job)
    finally:
        cluster.tool("exec", "n1", "umount", "-l", str(disk))
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert f"cannot write {disk}/.step-00000100.tmp/" in run.log() and "No space left on device" in run.log()
    assert run.events("started")[-1]["step"] == 50
    full.note("the file is named; back to the queue, goes on when there is room", run.losses() == whole.losses())
    assert run.losses() == whole.losses()


def test_a_flipped_bit_in_a_checkpoint(whole, make, cluster, fault) -> None:
    """It is never trained on: the job names the file and ends. An older checkpoint that is named goes on to the same losses."""
    run = make("bit")
    job = run.submit(*TWO_BY_TWO, BY_RANK)
    run.wait_for(lambda: any(event["step"] == 100 for event in run.events("saved")))
    subprocess.run(["scancel", job], check=True)
    assert cluster.wait(job)["JobState"] == "CANCELLED", run.log()
    older, *_, newest = sorted((run.folder / "checkpoints").glob("step-*"))
    assert (run.folder / "checkpoints" / "latest").read_text().strip() == newest.name
    shard = sorted(newest.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    flip = fault("flipped bit", run.folder)
    found = cluster.wait(run.submit(*TWO_BY_TWO, BY_RANK))
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0"), run.log()
    assert shard.name in run.log() and "CRC-32" in run.log()
    flip.note("the file is named, the job ends; an older checkpoint can be named")
    (run.folder / "checkpoints" / "latest").write_text(older.name + "\n")
    assert cluster.wait(run.submit(*TWO_BY_TWO, BY_RANK))["JobState"] == "COMPLETED", run.log()
    assert run.losses() == whole.losses()
