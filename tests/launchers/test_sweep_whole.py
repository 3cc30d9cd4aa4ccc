"""Sweeps on this machine with real runs: a search that is killed and goes on, folds, and a point that fails among others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megalm.config.data import PrepareConfig
from megalm.runfolder import RESULT, read_events, read_result

pytestmark = [pytest.mark.slow, pytest.mark.dist]
MEGALM = (sys.executable, "-m", "megalm.launchers.cli")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with small.yaml and its corpus."""
    from megalm.data.tokenize import prepare

    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.py").write_text("\n".join(f"def f{i}_{j}(x): return x * {i * j}" for j in range(8)))
    prepare(PrepareConfig(source=str(tmp_path / "text"), output=str(tmp_path / "data"), vocab_size=300))
    settings = {
        "model": {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2},
        "data": {"path": str(tmp_path / "data" / "corpus"), "seq_length": 16, "split": "0.8,0.2,0"},
        "train": {"steps": 4, "global_batch_size": 4, "eval_every": 2, "eval_samples": 4},
        "optim": {"min_lr": 0, "warmup_steps": 1},
        "cluster": {"device": "cpu"},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [*MEGALM, "pretrain", "-m", "small.yaml", "hydra.sweep.dir=sweep", *arguments]


@pytest.fixture
def run(place: Path) -> Run:
    def start(*words: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*words), cwd=place, capture_output=True, text=True, timeout=seconds, check=False)

    return start


def megalm(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Another verb, which must end well."""
    return subprocess.run([*MEGALM, *words], cwd=place, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.timeout(600)
def test_a_search_that_is_killed_goes_on_to_its_last_trial(place: Path, run: Run) -> None:
    """kill -9 to the search while a point trains: the point saves and ends with it, and goes on from there; none starts anew."""
    import optuna

    sweeper = ["hydra/sweeper=megalm_optuna", "hydra.sweeper.trials=6", "hydra.sweeper.pruner=median", "hydra.sweeper.startup=1"]
    arguments = [*sweeper, "optim.lr=tag(log,interval(1e-6,1e-1))", "train.steps=1500", "train.eval_every=100"]
    root = place / "sweep"
    with open(place / "first", "w") as console:
        search = subprocess.Popen(command(*arguments), cwd=place, stdout=console, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 240
            while not (metrics := root / "2" / "metrics.jsonl").exists() or metrics.read_text().count("\n") < 20:
                assert search.poll() is None and time.monotonic() < end, (place / "first").read_text()
                time.sleep(0.05)
        finally:
            search.send_signal(signal.SIGKILL)
            search.wait()
    end = time.monotonic() + 60
    while "stopping" not in (kinds := [event["kind"] for event in read_events(root / "2")]) or "saved" not in kinds[-2:]:
        assert time.monotonic() < end, kinds
        time.sleep(0.1)

    done = run(*arguments, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    backend = optuna.storages.journal.JournalFileBackend(str(root / "optuna.journal"))
    trials = optuna.load_study(study_name="megalm", storage=optuna.storages.JournalStorage(backend)).trials
    states = [trial.state.name for trial in trials]
    assert len(states) == 6 and set(states) == {"COMPLETE", "PRUNED"}, states
    folders = [Path(trial.user_attrs["folder"]).name for trial in trials]
    assert sorted(folders) == [str(n) for n in range(6)] == sorted(path.parent.name for path in root.glob(f"*/{RESULT}"))
    begun = {n: [event["step"] for event in read_events(root / n) if event["kind"] == "started"] for n in folders}
    assert begun["2"][0] == 0 and len(begun["2"]) == 2 and begun["2"][1] >= 19, "it goes on from where it saved"
    pruned = folders[states.index("PRUNED")]
    said = megalm(place, "status", str(root / pruned))
    assert "PRUNED: given up by the search, at step " in said.stdout
    assert all(steps == [0] for n, steps in begun.items() if n != "2"), begun


def test_folds_cover_every_document_once_and_have_a_mean(place: Path, run: Run) -> None:
    done = run("data.fold=range(0,5)", "hydra.launcher.jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [read_result(place / "sweep" / str(n)) for n in range(5)]
    values = [result.value for result in results if result is not None]
    assert len(set(values)) == 5, "each validates on other documents"
    said = megalm(place, "sweep", "report", "sweep")
    mean = sum(values) / 5
    assert f"{mean:.4f} +- " in said.stdout and "(5 folds)" in said.stdout
    assert "data.fold" not in said.stdout.partition("best: ")[2]


def test_a_point_that_fails_is_shown_and_the_others_go_on(place: Path, run: Run) -> None:
    """One learning rate makes the loss infinite: which no rule can tell beforehand."""
    done = run("optim.lr=1e-3,1e30,1e-2", "train.steps=6", "hydra.launcher.jobs=1")
    assert done.returncode == 3, "the exit code of the one that failed: hopeless"
    assert [bool(read_result(place / "sweep" / str(n))) for n in range(3)] == [True, False, True]
    assert "point 1 (optim.lr=1e30): failed" in done.stdout.replace("1e+30", "1e30"), done.stdout
    words = ("point 1 = ", "must stay finite", "console.log")
    assert all(text in done.stderr for text in words) and "Traceback" not in done.stderr, done.stderr
    said = megalm(place, "sweep", "report", "sweep")
    rows = [line.split()[:4] for line in said.stdout.splitlines()[1:4]]
    assert [row[3] for row in rows] == ["finished", "finished", "failed"] and rows[2][:2] == ["1", "-"]
