"""A run that is a point of a sweep leaves a result, and ends early when its search has given it up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.config.run import RunConfig
from megalm.errors import ExitCode
from megalm.observe.folder import read_run
from megalm.observe.starts import starts_of
from megalm.observe.verdict import judge
from megalm.runfolder import FINISHED, POINT, PRUNE, RESULT, is_finished, read_result
from megalm.train.pretrain import pretrain

Make = Callable[..., RunConfig]


def as_point(config: RunConfig) -> Path:
    folder = Path(config.train.run_dir)
    folder.mkdir()
    (folder / POINT).write_text("{}")
    return folder


def test_a_point_leaves_its_best_validation_loss(make: Make) -> None:
    config = make("run", {"train.steps": 6, "train.eval_every": 2})
    folder = as_point(config)
    assert pretrain(config) == ExitCode.FINISHED
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min(record["valid_loss"] for record in records if "valid_loss" in record)
    result = read_result(folder)
    assert result is not None and (result.value, result.step, result.status, result.metric) == (best, 6, "finished", "valid_loss")


def test_without_evaluation_it_is_the_training_loss(make: Make) -> None:
    config = make("run", {"train.steps": 3, "train.eval_every": 0})
    folder = as_point(config)
    pretrain(config)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = read_result(folder)
    assert result is not None and result.metric == "loss" and result.value == pytest.approx(sum(losses) / 3)


def test_a_point_that_is_given_up_ends_at_its_next_evaluation(make: Make) -> None:
    config = make("run", {"train.steps": 20, "train.eval_every": 4})
    folder = as_point(config)
    (folder / PRUNE).touch()
    assert pretrain(config) == ExitCode.FINISHED
    result = read_result(folder)
    assert result is not None and (result.step, result.status) == (4, "pruned")
    run = read_run(folder)
    assert judge(run, time.time() + 9999, False).state == "pruned"  # long after its process has ended
    assert [start.ending for start in starts_of(run)] == ["given up by the search"]
    assert not is_finished(folder)  # it has not reached its goal, and goes on where the file is taken away
    (folder / PRUNE).unlink()
    assert pretrain(config) == ExitCode.FINISHED
    result = read_result(folder)
    assert result is not None and (result.step, result.status) == (20, "finished")


@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_run_that_was_killed_after_its_last_step_leaves_its_result_the_next_time(eval_every: int, make: Make) -> None:
    """Between the last checkpoint and result.json: there is nothing left to train, and the sweep waits for it."""
    config = make("run", {"train.steps": 4, "train.eval_every": eval_every, "train.log_every": 3})
    folder = as_point(config)
    pretrain(config)
    first = read_result(folder)
    (folder / RESULT).unlink()
    (folder / FINISHED).unlink()
    again = make("run", {"train.steps": 4, "train.eval_every": eval_every, "train.log_every": 3})
    assert pretrain(again) == ExitCode.FINISHED
    second = read_result(folder)
    assert first is not None and second is not None and second.value == pytest.approx(first.value)
    assert (second.step, second.status, second.metric) == (first.step, "finished", first.metric)


def test_a_run_of_its_own_is_no_point(make: Make) -> None:
    config = make("run", {"train.steps": 4, "train.eval_every": 2})
    Path(config.train.run_dir).mkdir()
    (Path(config.train.run_dir) / PRUNE).touch()
    pretrain(config)
    assert is_finished(Path(config.train.run_dir)) and not (Path(config.train.run_dir) / RESULT).exists()
