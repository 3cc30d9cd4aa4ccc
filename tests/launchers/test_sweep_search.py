"""A search: what it draws, that it learns, prunes, and goes on after a kill. The points are played, Optuna is real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.config.run import RunConfig
from megalm.errors import ConfigError, Problem
from megalm.launchers.sweep.point import Point, SweepCommand, failure
from megalm.launchers.sweep.search import losses, search
from megalm.launchers.sweep.space import read_space
from megalm.runfolder import PRUNE, Result, write_result

SPACE = ["train.steps=20", "optim.lr=tag(log,interval(1e-5,1e-1))", "model.num_layers=range(1,5)"]


def settings(**changes: Any) -> SimpleNamespace:
    known = {"trials": 6, "at_once": 1, "sampler": "tpe", "pruner": "none", "startup": 3, "warmup_steps": 0, "seed": 1}
    return SimpleNamespace(**(known | changes))


class Played:
    """A launcher whose points have a loss that falls towards the one of their learning rate; best at 1e-3."""

    def __init__(self, root: Path, stop_at: int = -1):
        root.mkdir(exist_ok=True)
        self.root, self.stop_at, self.ran = root, stop_at, list[list[str]]()
        self.watch: Callable[[Sequence[Point]], None] | None = None

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        done = []
        for own in overrides:
            if len(self.ran) == self.stop_at:
                raise KeyboardInterrupt
            folder = self.root / f"point-{hash(tuple(own)) & 0xFFFFFF}"
            folder.mkdir(exist_ok=True)
            self.ran.append(list(own))
            self._run(Point(len(self.ran), list(own), folder, [], self._config(), folder, "running"))
            done.append(SimpleNamespace(working_dir=str(folder)))
        return done

    def _config(self) -> RunConfig:
        config = RunConfig()
        config.train.steps, config.train.eval_every = 20, 5
        return config

    def _run(self, point: Point) -> None:
        import math

        lr = float(next(text for text in point.overrides if text.startswith("optim.lr=")).partition("=")[2])
        goal = 1 + abs(math.log10(lr) + 3)
        for step in range(5, 21, 5):
            with open(point.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "loss": 9}) + "\n" + json.dumps({"step": step, "valid_loss": goal}) + "\n")
            if self.watch is not None:
                self.watch([point])
            if (point.folder / PRUNE).exists():
                return write_result(point.folder, Result(goal, step, "pruned", "valid_loss"))
        return write_result(point.folder, Result(goal, 20, "finished", "valid_loss"))


def test_space_in_hydras_words() -> None:
    words = ["a=1", "optim.lr=tag(log,interval(1e-5,1e-1))", "train.seed=int(interval(1,9))", "train.steps=range(10,50,20)"]
    words += ["model=tiny,tiny_gpt", "optim.clip=range(0.5,2,0.5)", "data.split=choice('0.9,0.1,0','0.8,0.2,0')"]
    fixed, space = read_space(words, RunConfig)
    assert fixed == ["a=1"]
    lr, seed, steps, model, clip, split = (d.distribution() for d in space)
    assert (lr.low, lr.high, lr.log) == (1e-5, 0.1, True)
    assert (seed.low, seed.high, type(seed).__name__) == (1, 9, "IntDistribution")
    assert (steps.low, steps.high, steps.step) == (10, 30, 20)
    assert model.choices == ("tiny", "tiny_gpt") and len(split.choices) == 2
    assert (clip.low, clip.high, clip.step) == (0.5, 1.5, 0.5)


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("optim.lr=tag(log,interval(0,1))", "a logarithm needs ends above 0"),
        ("train.seed=interval(1.5,2.5)", "takes whole numbers"),
        ("model.architecture=interval(1,2)", "takes no numbers"),
        ("optim.lr=1", "a search needs a setting to draw"),
    ],
)
def test_space_that_cannot_be(word: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        read_space([word], RunConfig)


def test_the_best_is_found_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played = Played(tmp_path)
    sweep = SweepCommand("pretrain")
    sweep.failures.append(failure(Point(0, [], tmp_path, [], RunConfig(), tmp_path), "diverged", 3))
    best = search(SPACE, settings(trials=25), played, sweep, str(tmp_path))
    assert best is not None and best < 1.5
    assert len(played.ran) == 25 and all("train.steps=20" in own for own in played.ran)
    assert "25 complete" in capsys.readouterr().out and not sweep.failures


def test_more_trials_go_on_from_the_ones_before_and_none_is_drawn_again(tmp_path: Path) -> None:
    for trials, new in ((4, 4), (4, 0), (7, 3)):
        played = Played(tmp_path)
        search(SPACE, settings(trials=trials, sampler="random"), played, SweepCommand("pretrain"), str(tmp_path))
        assert len(played.ran) == new
    assert len(list(tmp_path.glob("point-*"))) == 7


def test_a_search_that_was_stopped_runs_its_open_point_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, settings(at_once=2), Played(tmp_path, stop_at=3), SweepCommand("pretrain"), str(tmp_path))
    played = Played(tmp_path)
    search(SPACE, settings(at_once=2), played, SweepCommand("pretrain"), str(tmp_path))
    assert len(played.ran) == 4  # six in all, of which two were told; the open two come first, one of them is repeated
    assert len(list(tmp_path.glob("point-*"))) == 6


def test_bad_points_are_ended_early(tmp_path: Path) -> None:
    for pruner in ("median", "hyperband"):
        root = tmp_path / pruner
        search(SPACE, settings(trials=15, pruner=pruner, sampler="random"), Played(root), SweepCommand("pretrain"), str(root))
        results = [json.loads(path.read_text()) for path in root.glob("*/result.json")]
        pruned = [r["value"] for r in results if r["status"] == "pruned"]
        finished = [r["value"] for r in results if r["status"] == "finished"]
        assert len(pruned) >= 2 and min(finished) < min(pruned), pruner


def test_another_space_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    search(SPACE, settings(trials=1), Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"the search in .* draws"):
        search(["optim.lr=interval(1,2)"], settings(), Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))


def test_settings_that_do_not_go_together_are_a_failed_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Picky(Played):
        def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
            if any("model.num_layers=2" in own for own in overrides):
                raise ConfigError(Problem("model.num_layers", 2, "not with this"))
            return super().launch(overrides, initial_job_idx)

    played = Picky(tmp_path)
    search(SPACE, settings(trials=12, at_once=3, sampler="random"), played, SweepCommand("pretrain"), str(tmp_path))
    said = capsys.readouterr()
    failed = said.err.count("not with this")
    assert 0 < failed < 12 and len(played.ran) == 12 - failed and f"{12 - failed} complete, {failed} fail" in said.out


@pytest.mark.timeout(60)
def test_what_a_killed_search_leaves_is_mended(tmp_path: Path) -> None:
    """Its lock, which Optuna would wait for, and half a line, behind which the next one could not be read."""
    search(SPACE, settings(trials=2), Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))
    (tmp_path / "optuna.journal.lock").symlink_to(tmp_path / "optuna.journal")
    with open(tmp_path / "optuna.journal", "a") as journal:
        journal.write('{"op_code":5,"work')
    for trials in (3, 4):  # the second reads what the first has written behind it
        begun, played = time.monotonic(), Played(tmp_path)
        search(SPACE, settings(trials=trials), played, SweepCommand("pretrain"), str(tmp_path))
        assert len(played.ran) == 1 and time.monotonic() - begun < 20


@pytest.mark.parametrize("text", ["not a journal\nof Optuna\n", "[1]\n[2]\n", '{"op_code":99}\n{"op_code":4}\n'])
def test_a_journal_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").write_text(text)
    with pytest.raises(ConfigError, match="not a journal of Optuna") as caught:
        search(SPACE, settings(trials=2), Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))
    assert "mv " in caught.value.problems[0].fix


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 problems"):
        bad = settings(sampler="tbe", pruner="x", trials=0)
        search(SPACE, bad, Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))


def test_training_loss_where_nothing_is_evaluated(tmp_path: Path) -> None:
    config = RunConfig()
    config.train.eval_every, config.train.log_every = 0, 2
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": i}) + "\n" for i in range(1, 6)) + '{"ste')
    assert losses(Point(0, [], tmp_path, [], config, tmp_path)) == [(2, 1.5), (4, 3.5)]


def test_killed_and_continued(tmp_path: Path) -> None:
    """kill -9 in the middle of a point: two searches may not be there at once, and the next one ends what was begun."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sweep_search import *
class Slow(Played):
    def _run(self, point):
        super()._run(point) if len(self.ran) < 3 else (Path("third").touch(), time.sleep(100))
search(SPACE, settings(), Slow(Path.cwd()), SweepCommand("pretrain"), ".")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        while not (tmp_path / "third").exists():
            assert process.poll() is None
            time.sleep(0.1)
        with pytest.raises(ConfigError, match="another search is at work there"):
            search(SPACE, settings(), Played(tmp_path), SweepCommand("pretrain"), str(tmp_path))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    played = Played(tmp_path)
    search(SPACE, settings(), played, SweepCommand("pretrain"), str(tmp_path))
    assert len(played.ran) == 4
    assert len(list(tmp_path.glob("point-*/result.json"))) >= 4
