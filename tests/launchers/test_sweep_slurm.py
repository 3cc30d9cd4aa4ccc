"""A sweep on SLURM, with commands that only write down how they were called: scripts, arrays, what is submitted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.launchers.slurm import history
from megalm.launchers.slurm.plan import read_job
from megalm.launchers.sweep.cluster import submit_points
from megalm.launchers.sweep.point import Point
from megalm.runfolder import Result, write_result

FAKE = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__)
calls = here.parent / "calls.jsonl"
count = len(calls.read_text().splitlines()) if calls.exists() else 0
with open(calls, "a") as file:
    file.write(json.dumps([here.name, *sys.argv[1:]]) + "\\n")
if here.name == "sbatch" and "--parsable" in sys.argv:
    print(100 + count)
states = here.parent / "states.json"
if here.name == "scontrol" and "job" in sys.argv:
    state = json.loads(states.read_text()).get(sys.argv[-1], "") if states.exists() else ""
    if not state:
        sys.exit(1)
    print("JobId=" + sys.argv[-1], "JobState=" + state)
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the fake commands lie, and the file of their calls."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("sbatch", "scontrol", "sinfo", "squeue", "scancel"):
        (place / name).write_text(FAKE.format(python=sys.executable))
        (place / name).chmod(0o755)
    return place


@pytest.fixture
def run(tmp_path: Path, folder: Path) -> Run:
    """`megalm pretrain -m ...` on SLURM, into tmp_path/sweep."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = ["pretrain", "-m", "model=tiny", "cluster.device=cpu", "hydra.sweep.dir=sweep", *arguments]
        environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "megalm.launchers.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)

    return start


def calls(folder: Path, name: str) -> list[list[str]]:
    path = folder / "calls.jsonl"
    made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call[1:] for call in made if call[0] == name]


def submitted(folder: Path) -> list[str]:
    return [call[-1] for call in calls(folder, "sbatch") if "--parsable" in call]


def test_every_point_is_a_job_with_a_script_of_its_own(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("cluster=slurm", "optim.lr=1e-3,3e-4", "parallel.tensor_parallel=1,2", "slurm.partition=p1", "slurm.launch=rank")
    assert done.returncode == 0, done.stderr
    assert submitted(folder) == [str(tmp_path / "sweep" / str(n) / "job.sh") for n in range(4)]
    scripts = [Path(path).read_text() for path in submitted(folder)]
    for number, text in enumerate(scripts):
        assert f"#SBATCH --job-name=megalm-{number}\n" in text and "#SBATCH --partition=p1\n" in text
        assert f"train.run_dir={tmp_path}/sweep/{number}" in text and "hydra/" not in text
    assert "--ntasks-per-node=2\n" in scripts[1] and "--ntasks-per-node=1\n" in scripts[0]
    assert "optim.lr=0.0003" in scripts[3] and "optim.lr=0.001" in scripts[0]
    assert all("cluster.name=local" in text for text in scripts), "the ranks would submit it once more"
    asked = [call for call in calls(folder, "sbatch") if "--test-only" in call]
    assert len(asked) == 2, "of two kinds: one task on the node, and two"
    assert (tmp_path / "sweep" / "3" / "config.yaml").exists()
    for path in submitted(folder):
        subprocess.run(["bash", "-n", path], check=True)


def test_what_has_a_result_or_a_job_is_not_submitted_again(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("hydra/launcher=megalm_slurm", "optim.lr=1e-3,3e-4,1e-4").returncode == 0
    assert len(submitted(folder)) == 3
    write_result(tmp_path / "sweep" / "0", Result(2.0, 100, "finished"))
    (job,) = history.jobs_of(tmp_path / "sweep" / "2")
    (folder / "states.json").write_text(json.dumps({job: "PENDING"}))
    again = run("hydra/launcher=megalm_slurm", "optim.lr=1e-3,3e-4,1e-4")
    assert submitted(folder)[3:] == [str(tmp_path / "sweep" / "1" / "job.sh")], again.stdout
    assert "point 0: finished before" in again.stdout and f"point 2: submitted before, job {job}" in again.stdout


def test_secrets_are_not_handed_over_and_that_is_said(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sbatch").write_text(f'#!/bin/bash\n[ "$1" = --version ] || env >> {folder}/environments\necho 100\n')
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    for array in (0, 2):
        done = run("cluster=slurm", f"hydra.launcher.array_from={array}", "optim.lr=1e-3,3e-4", f"train.seed={array}")
        assert done.returncode == 0 and "not handed to SLURM" in done.stdout and "WANDB_API_KEY" in done.stdout, done.stderr
    assert (folder / "environments").read_text().count("\nPWD=") >= 5, "sbatch was asked, and took jobs"
    kept = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(kept) > 10 and not any("very-secret" in path.read_text(errors="replace") for path in kept)


def test_many_alike_are_an_array(run: Run, folder: Path, tmp_path: Path) -> None:
    settings = ["hydra/launcher=megalm_slurm", "hydra.launcher.array_from=3", "hydra.launcher.at_once=2"]
    done = run(*settings, "optim.lr=1e-3,3e-4,1e-4", "slurm.minutes=5,6")
    assert done.returncode == 0, done.stderr
    scripts = [Path(path) for path in submitted(folder)]
    assert [path.name for path in scripts] == ["array-0.sh"]  # minutes do not make another point: three in all
    text = scripts[0].read_text()
    assert "#SBATCH --array=0,1,2%2\n" in text and f"#SBATCH --output={tmp_path}/sweep/%a/logs/slurm-%A_%a.out\n" in text
    (key,) = history.jobs_of(tmp_path / "sweep" / "1")
    assert key.endswith("_1")
    (tmp_path / "sweep" / "1" / "job.sh").write_text("echo this is point 1\n")
    environ = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    said = subprocess.run(["bash", str(scripts[0])], env=environ, capture_output=True, text=True, check=True)
    assert said.stdout == "this is point 1\n"


@pytest.mark.parametrize("name", ["my 50% sweep", 'sw" --uid=0 --comment="x', "sw\n#SBATCH --uid=0"])
def test_the_folder_of_an_array_brings_no_option(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the points' own folders are elsewhere, and harmless."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    config = read_job("pretrain", ["model=tiny", "cluster.device=cpu", f"train.run_dir={tmp_path}/run"]).config
    points = [Point(number, [], tmp_path / "run", [], config, tmp_path / name / str(number)) for number in range(2)]
    if "uid" in name:
        with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir(.|\n)*the folder of a job has no quotes"):
            submit_points(points, array_from=2, at_once=0)
        assert submitted(folder) == []
        return
    (tmp_path / name).mkdir()
    submit_points(points, array_from=2, at_once=0)
    text = Path(submitted(folder)[0]).read_text()
    assert f'#SBATCH --output="{tmp_path}/my 50%% sweep/%a/logs/slurm-%A_%a.out"\n' in text


def test_a_faulty_point_stops_all_before_any_is_submitted(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("cluster=slurm", "train.global_batch_size=16,15", "train.micro_batch_size=2")
    assert done.returncode == 2 and "global_batch_size" in done.stderr, done.stderr
    assert submitted(folder) == [] and not (tmp_path / "sweep").exists()
    done = run("cluster=slurm", "optim.lr=1e-3,3e-4", "slurm.partition='a;touch pwn'")
    assert done.returncode == 2 and submitted(folder) == [] and not (tmp_path / "pwn").exists()


def test_points_for_gpus_are_submitted_from_a_machine_without(run: Run, folder: Path) -> None:
    gpus = ["cluster.device=cuda", "slurm.gpus_per_node=4", "kernels.rms_norm=triton"]
    done = run("cluster=slurm", "optim.lr=1e-3,3e-4", *gpus)
    assert done.returncode == 0 and len(submitted(folder)) == 2, done.stderr


def test_waiting_ends_with_the_jobs(run: Run, folder: Path) -> None:
    """One that SLURM has forgotten and that left no result has failed: nobody waits for ever."""
    begun = time.monotonic()
    settings = ["hydra.launcher.wait=yes", "hydra.launcher.poll_seconds=0.1"]
    done = run("hydra/launcher=megalm_slurm", *settings, "optim.lr=1e-3,3e-4")
    assert done.returncode == 1 and done.stderr.count("its job ended without a result") == 2, done.stderr
    assert time.monotonic() - begun < 100
    assert done.stdout.count(": submitted job ") == 2 and done.stdout.count(": failed its job ended without a result") == 2


def test_without_slurm_nothing_is_written(tmp_path: Path) -> None:
    words = ["pretrain", "-m", "cluster=slurm", "optim.lr=1e-3,3e-4", "hydra.sweep.dir=sweep"]
    environ = {**os.environ, "PATH": "/nowhere"}
    command = [sys.executable, "-m", "megalm.launchers.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "sbatch is not on the PATH" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sweep/*/*")), "Hydra makes the folder, and no point lies in it"


def test_an_interval_needs_a_search(run: Run) -> None:
    done = run("optim.lr=interval(1e-4,1e-2)")
    assert done.returncode == 2 and "hydra/sweeper=megalm_optuna" in done.stderr
