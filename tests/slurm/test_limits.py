"""What ends a start without being a fault of it: the time limit itself, a full disk, a damaged checkpoint; and job arrays."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.launchers.slurm import client
from megalm.runfolder import read_progress

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]
TWO_BY_TWO = ("parallel=tp2_pp2", "slurm.nodes=2")
BY_RANK = "slurm.launch=rank"


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
    assert asked["job"] == job and heard["signal"] == "SIGUSR1"
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
    """A checkpoint finds no room: the job says so, starts again, says that the disk is full, and goes on when there is room."""
    run = make("full")
    folder = run.folder
    folder.mkdir()
    cluster.tool("exec", "n1", "mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder))
    cluster.tool("exec", "n1", "mkdir", str(folder / "logs"))
    try:
        job = run.submit("parallel=tp2_pp2", BY_RANK, "slurm.extra=['--nodelist=n1']", "slurm.max_failures=8")
        run.folder = cluster.seen_from("n1", folder)
        run.wait_for_step(60)
        full = fault("full disk", run.folder)
        fill = "cat /dev/zero > fill; truncate -s -200K fill"  # for a log there is room, for a checkpoint there is none
        subprocess.run(["bash", "-c", fill], cwd=run.folder, capture_output=True, check=True)
        run.wait_for(lambda: "fewer than 64" in run.log() or client.state_of(job) not in client.LIVE)
        (run.folder / "fill").unlink()
        found = cluster.wait(job)
        assert found["JobState"] == "COMPLETED", run.log()
        assert "No space left on device" in run.log() and "MiB left, fewer than 64" in run.log()
        full.note("said; tried again; goes on when there is room", run.losses() == whole.losses())
        assert run.losses() == whole.losses()
    finally:
        cluster.tool("exec", "n1", "umount", "-l", str(folder))


def test_a_flipped_bit_in_a_checkpoint(whole, make, cluster, fault) -> None:
    """It is never trained on: the job names the file and ends. An older checkpoint that is named goes on to the same losses."""
    run = make("bit")
    assert cluster.wait(run.submit(*TWO_BY_TWO, BY_RANK, "train.steps=100"))["JobState"] == "COMPLETED", run.log()
    assert (read_progress(run.folder) or pytest.fail("no progress")).saved_step == 100
    (newest,) = (run.folder / "checkpoints").glob("step-*100")
    shard = sorted(newest.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    flip = fault("flipped bit", run.folder)
    found = cluster.wait(run.submit(*TWO_BY_TWO, BY_RANK))
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0"), run.log()
    assert shard.name in run.log() and "CRC-32" in run.log()
    flip.note("the file is named, the job ends; an older checkpoint can be named")
    (older,) = (run.folder / "checkpoints").glob("step-*50")
    (run.folder / "checkpoints" / "latest").write_text(older.name + "\n")
    assert cluster.wait(run.submit(*TWO_BY_TWO, BY_RANK))["JobState"] == "COMPLETED", run.log()
    assert run.losses() == whole.losses()
