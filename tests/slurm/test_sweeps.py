"""Sweeps on a real SLURM: a grid with its report and a second start, and a search that is killed half way and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.launchers.slurm import client, history
from megalm.runfolder import POINT, RESULT, read_events, read_result

pytestmark = pytest.mark.slurm
MEGALM = (sys.executable, "-m", "megalm.launchers.cli")


def words(run, *arguments: str, steps: int) -> list[str]:
    """The sweep of a small model below run.folder, every point on one CPU."""
    settings = run.settings | {"train.steps": steps, "train.eval_samples": 4, "optim.min_lr": 0, "tracking.wandb": "off"}
    own = [f"{key}={value}" for key, value in settings.items() if key != "train.run_dir"] + ["data.split='0.8,0.2,0'"]
    return [*MEGALM, "pretrain", "-m", *own, f"hydra.sweep.dir={run.folder}", "hydra/launcher=megalm_slurm", *arguments]


def start(command: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False)


def logs_of_jobs(folder: Path) -> list[str]:
    """One per start of a job, of all points."""
    return sorted(path.name for path in folder.glob("*/logs/slurm-*.out"))


def test_a_sweep_of_four_its_report_and_its_second_start(make, cluster, tmp_path: Path) -> None:
    """Four jobs on the nodes, all finished; table, pictures and page; the best as a command that is sound; none runs again."""
    run = make("grid")
    command = words(run, "optim.lr=1e-2,1e-5", "model.num_layers=1,2", "train.eval_every=10", "hydra.launcher.wait=yes", steps=20)
    done = start([*command, "hydra.launcher.poll_seconds=0.5"], tmp_path, 280)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [history.jobs_of(run.folder / str(n)) for n in range(4)]
    assert len({job for (job,) in jobs}) == 4 and {client.state_of(job) for (job,) in jobs} == {"COMPLETED"}
    results = [read_result(run.folder / str(n)) for n in range(4)]
    assert all(result and (result.step, result.status, result.metric) == (20, "finished", "valid_loss") for result in results)
    hosts = {host for n in range(4) for event in read_events(run.folder / str(n)) for host in event.get("hosts", ())}
    assert hosts and hosts <= set(client.hostnames(client.ask("sinfo", "-h", "-o", "%N").out.strip()))

    said = start([*MEGALM, "sweep", "report", str(run.folder)], tmp_path, 60)
    assert said.returncode == 0, said.stderr
    values = {n: result.value for n, result in enumerate(results) if result is not None}
    order = sorted(values, key=values.__getitem__)
    table = [line.split() for line in said.stdout.splitlines()[1:5]]
    assert [row[:4] for row in table] == [[str(n), f"{values[n]:.4f}", "20", "finished"] for n in order]
    best = said.stdout.partition("best: ")[2].splitlines()[1].strip()
    for name in ("slices.png", "parallel.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")
    page = (run.folder / "report.html").read_text()
    assert page.count("<circle") == 8 and not re.search(r"""(src|href)=|url\(|@import""", page)
    assert "megalm pretrain " in best and "optim.lr=0.01 " in best
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    checked = best.replace("megalm pretrain ", f"{' '.join(MEGALM)} check pretrain ")
    sound = subprocess.run(["bash", "-c", checked], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert sound.returncode == 0 and sound.stdout.startswith("ok: pretrain as single on 1 CPU process"), sound

    before = logs_of_jobs(run.folder)
    again = start(command, tmp_path, 60)
    assert again.returncode == 0 and again.stdout.count(": finished before") == 4, again.stdout + again.stderr
    assert [history.jobs_of(run.folder / str(n)) for n in range(4)] == jobs and logs_of_jobs(run.folder) == before


@pytest.mark.slow
def test_an_array_and_one_of_its_points_by_hand(make, cluster, tmp_path: Path) -> None:
    """Three points as one array, two at a time; the script of one runs alone too, and finds that only its result is missing."""
    run = make("array")
    settings = ["hydra.launcher.array_from=2", "hydra.launcher.at_once=2", "hydra.launcher.poll_seconds=0.5"]
    command = words(run, "optim.lr=1e-2,1e-3,1e-4", *settings, "hydra.launcher.wait=yes", steps=10)
    done = start(command, tmp_path, 280)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [job for n in range(3) for job in history.jobs_of(run.folder / str(n))]
    assert len({job.partition("_")[0] for job in jobs}) == 1 and [job.partition("_")[2] for job in jobs] == ["0", "1", "2"]
    assert [result and result.step for result in (read_result(run.folder / str(n)) for n in range(3))] == [10] * 3
    result = read_result(run.folder / "1")
    (run.folder / "1" / RESULT).unlink()
    by_hand = client.ask("sbatch", "--parsable", str(run.folder / "1" / "job.sh"))
    assert cluster.wait(by_hand.out.strip())["JobState"] == "COMPLETED", by_hand
    assert read_result(run.folder / "1") == result


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_that_is_killed_half_way_goes_on_to_eight_trials(make, cluster, tmp_path: Path) -> None:
    """kill -9 to the search, its jobs go on; started again it draws the rest: eight trials, none lost, none run twice."""
    import optuna

    run = make("search")
    drawn = ["optim.lr=tag(log,interval(1e-6,1e-1))", "train.eval_every=20", "optim.warmup_steps=5"]
    settings = {"trials": 8, "at_once": 2, "pruner": "median", "startup": 2, "warmup_steps": 20, "seed": 3}
    sweeper = ["hydra/sweeper=megalm_optuna", *(f"hydra.sweeper.{key}={value}" for key, value in settings.items())]
    command = words(run, *drawn, *sweeper, "hydra.launcher.poll_seconds=0.3", steps=600)
    results, points = (lambda: list(run.folder.glob(f"*/{RESULT}"))), (lambda: list(run.folder.glob(f"*/{POINT}")))
    with open(tmp_path / "first", "w") as console:
        search = subprocess.Popen(command, cwd=tmp_path, stdout=console, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 240
            while len(results()) < 3 or len(points()) <= len(results()):
                assert search.poll() is None and time.monotonic() < end, (tmp_path / "first").read_text()
                time.sleep(0.1)
        finally:
            search.send_signal(signal.SIGKILL)
            search.wait()
    at_work = {path.parent.name for path in points()} - {path.parent.name for path in results()}
    assert 3 <= len(points()) < 8 and at_work

    done = start(command, tmp_path, 400)
    assert done.returncode == 0, done.stdout + done.stderr
    backend = optuna.storages.journal.JournalFileBackend(str(run.folder / "optuna.journal"))
    trials = optuna.load_study(study_name="megalm", storage=optuna.storages.JournalStorage(backend)).trials
    states = [trial.state.name for trial in trials]
    assert len(states) == 8 and set(states) == {"COMPLETE", "PRUNED"}, states
    assert len({trial.params["optim.lr"] for trial in trials}) == 8
    assert sorted(path.parent.name for path in points()) == [str(n) for n in range(8)]
    by_folder = {Path(trial.user_attrs["folder"]).name: trial for trial in trials}
    for n in range(8):
        folder, trial = run.folder / str(n), by_folder[str(n)]
        result = read_result(folder)
        assert result is not None and (result.status == "pruned") == (trial.state.name == "PRUNED")
        assert [event["step"] for event in read_events(folder) if event["kind"] == "started"] == [0], f"point {n} ran twice"
        assert result.step == 600 or result.status == "pruned"
    assert len(logs_of_jobs(run.folder)) == 8
    said = start([*MEGALM, "sweep", "report", str(run.folder)], tmp_path, 60)
    assert said.stdout.count(" pruned ") == states.count("PRUNED") and "best: " in said.stdout
