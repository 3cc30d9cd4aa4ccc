"""A sweep on this machine: which points run, how many at a time, what ends them, and what a second start does again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megalm.config.data import PrepareConfig
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.launchers.sweep import local
from megalm.launchers.sweep.command_line import with_launcher
from megalm.launchers.sweep.local import gpus_of, places, run_points
from megalm.launchers.sweep.point import Point, identity
from megalm.launchers.sweep.table import Table, names_of
from megalm.runfolder import Result, write_result

# What a point is here: says when it ran, then does as its first argument says
SCRIPT = """
import json, os, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
def saved(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
(folder / "began").write_text(str(time.time()))
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
time.sleep(60 if what == "long" else 0.4)
(folder / "ended").write_text(str(time.time()))
if what == "good":
    (folder / "result.json").write_text(json.dumps({"value": 1.5, "step": 9, "status": "finished", "metric": "loss"}))
sys.exit({"bad": 3, "good": 0, "silent": 0}[what])
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """make("good", "bad"): points that do so."""
    monkeypatch.setattr(local, "command_of", lambda p: [sys.executable, "-c", SCRIPT, str(p.folder), *p.overrides])

    def points(*kinds: str) -> list[Point]:
        made = []
        for number, kind in enumerate(kinds):
            (tmp_path / str(number)).mkdir()
            made.append(Point(number, [kind], tmp_path / str(number), [], RunConfig(), tmp_path / str(number)))
        return made

    return points


def test_points_run_a_few_at_a_time_and_a_bad_one_does_not_stop_the_others(make, capsys) -> None:
    points = make("good", "bad", "good", "silent")
    run_points(points, 2, "lines")
    assert [point.status for point in points] == ["finished", "failed", "finished", "failed"]
    assert points[1].error.exit_code == 3 and points[3].error.exit_code == 1
    assert "without a result.json" in str(points[3].error)
    began, ended = ([float((p.folder / name).read_text()) for p in points] for name in ("began", "ended"))
    for moment in began:
        assert sum(b <= moment < e for b, e in zip(began, ended, strict=True)) <= 2
    assert max(began[:2]) < min(ended[:2])  # two did run at a time
    said = capsys.readouterr().out
    assert "point 0 (good): finished, loss 1.5000 at step 9" in said and "point 1 (bad): failed, ended with exit code 3" in said


def test_a_finished_point_is_not_run(make) -> None:
    points = make("bad", "good")
    write_result(points[0].folder, Result(1.0, 1, "finished"))
    points[0].status = "finished"
    run_points(points, 0, "lines")
    assert [point.status for point in points] == ["finished", "finished"]
    assert not (points[0].folder / "began").exists()


def test_a_point_that_is_named_twice_runs_once(make) -> None:
    (point,) = make("good")
    run_points([point, point], 2, "lines")
    assert point.status == "finished"


def test_being_asked_to_stop_lets_all_save_and_starts_no_more(make) -> None:
    points = make("long", "long", "good")

    def ask() -> None:
        while not (points[1].folder / "began").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        run_points(points, 2, "lines")
    asking.join()
    assert [point.status for point in points] == ["stopped", "stopped", "waiting"]
    assert not (points[0].folder / "ended").exists()


def test_places_and_gpus(make, monkeypatch: pytest.MonkeyPatch) -> None:
    points = make("good", "good", "good")
    for point in points:
        point.config.cluster.num_processes = 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    assert places(points) == 2
    points[0].config.cluster.num_processes = 8
    assert places(points) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    points[0].config.cluster.num_processes = 2
    assert places(points) == 2
    assert [gpus_of(place, 2) for place in (0, 1)] == [["4", "5"], ["6", "7"]]
    with pytest.raises(ConfigError, match="needs a GPU of its own"):
        gpus_of(0, 5)


def test_a_point_is_its_settings() -> None:
    one, other = RunConfig(), RunConfig()
    other.cluster.num_processes, other.train.run_dir, other.slurm.minutes = 4, "elsewhere", 7
    assert identity(one) == identity(other)
    other.train.steps += 1
    assert identity(one) != identity(other)


def test_launcher_of_a_sweep() -> None:
    assert with_launcher(["-m", "a=1,2"], False)[-1] == "hydra/launcher=megalm_local"
    assert with_launcher(["-m", "cluster=slurm", "a=1,2"], True) == ["-m", "a=1,2", "hydra/launcher=megalm_slurm"]
    assert with_launcher(["-m", "hydra/launcher=basic"], False) == ["-m", "hydra/launcher=basic"]


def test_names_are_what_differs() -> None:
    assert names_of([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert names_of([["a=1"]]) == ["a=1"] and names_of([[]]) == ["as it stands"]


def test_the_live_table_is_drawn_over(make, capsys) -> None:
    points = make("good", "bad")
    with Table(points, "table"):
        points[0].status = "running"
    said = capsys.readouterr().out
    assert "\x1b[4A" in said and "1 running, 1 waiting" in said


@pytest.mark.slow
@pytest.mark.dist
def test_a_real_sweep_and_its_second_start(tmp_path: Path) -> None:
    from megalm.data.tokenize import prepare

    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.py").write_text("\n".join(f"def f{i}_{j}(x): return x * {i * j}" for j in range(8)))
    prepare(PrepareConfig(source=str(tmp_path / "text"), output=str(tmp_path / "data"), vocab_size=300))
    settings = {
        "model": {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2},
        "data": {"path": str(tmp_path / "data" / "corpus"), "seq_length": 16, "split": "0.8,0.2,0"},
        "train": {"steps": 4, "global_batch_size": 4, "eval_every": 2, "eval_samples": 4},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", "-m", "small.yaml", "hydra.sweep.dir=sweep"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    first = run("optim.lr=1e-2,1e-3")
    assert first.returncode == 0, first.stdout + first.stderr
    results = [json.loads((tmp_path / "sweep" / str(n) / "result.json").read_text()) for n in (0, 1)]
    assert [(r["step"], r["status"], r["metric"]) for r in results] == [(4, "finished", "valid_loss")] * 2
    assert results[0]["value"] != results[1]["value"]
    logs = [(tmp_path / "sweep" / str(n) / "console.log").stat().st_mtime_ns for n in (0, 1)]
    again = run("optim.lr=1e-3,1e-2")  # in another order: a point is known by its settings
    assert again.returncode == 0 and again.stdout.count("finished before") == 2
    assert logs == [(tmp_path / "sweep" / str(n) / "console.log").stat().st_mtime_ns for n in (0, 1)]
    bad = run("optim.lr=1e-2", "train.seed=1,-1")  # every point is looked at before any runs
    assert bad.returncode == 2 and "train.seed" in bad.stderr and not (tmp_path / "sweep" / "2").exists()
