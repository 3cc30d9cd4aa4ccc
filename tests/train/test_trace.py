"""A traced step: every action of every pipeline rank once, in order, in both files."""

from __future__ import annotations

import json

import pytest

from megalm.errors import RunError
from megalm.parallel.actions import Action
from megalm.parallel.schedules import build_schedule
from megalm.parallel.timeline import Times, simulate
from megalm.train.pretrain import pretrain
from megalm.train.trace import chrome_trace, timeline_of, usual_times


@pytest.mark.dist
def test_a_run_writes_its_trace(make, command, tmp_path):
    config = make(changes={"parallel.schedule": "zbv", "parallel.chunks": 2, "parallel.pipeline_parallel": 2})
    config.model.num_layers, config.train.steps, config.cluster.num_processes = 4, 3, 4  # two copies of two ranks
    config.train.global_batch_size, config.optim.warmup_steps = 8, 1
    run = command(config, "trace=traces/t.json", "trace_step=2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "step      2  bubble" in run.stdout
    events = json.loads((tmp_path / "traces/t.json").read_text())["traceEvents"]
    schedule = build_schedule("zbv", 2, 4, 2)
    for rank in range(2):
        mine = [event for event in events if event["tid"] == rank and event["ph"] == "X"]
        assert [event["name"] for event in mine] == [str(action) for action in schedule.actions[rank]]
        ends = [event["ts"] + event["dur"] for event in mine]
        assert all(end <= event["ts"] + 1 for end, event in zip(ends, mine[1:], strict=False))  # microseconds
    assert "step 2 as measured: bubble" in (tmp_path / "traces/t.svg").read_text()


@pytest.mark.dist
def test_a_ring_is_in_the_trace(make, command, tmp_path):
    """Of 2 ranks, 4 microbatches and 2 layers: whose keys were used when, within which action, and one exchange per round."""
    config = make(changes={"parallel.context_parallel": 2, "cluster.num_processes": 2, "train.steps": 2, "optim.warmup_steps": 1})
    run = command(config, "trace=t.json", "trace_step=2")
    assert run.returncode == 0, run.stdout + run.stderr
    events = [event for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in range(2):
        mine = [event for event in events if event["tid"] == rank]
        actions = [event for event in mine if event["cat"] in ("forward", "backward")]
        used = sorted((event for event in mine if event["name"].startswith("keys")), key=lambda event: event["ts"])
        assert [event["name"] for event in used] == [f"keys of rank {rank}", f"keys of rank {1 - rank}"] * 16
        assert len(actions) == 8 and all(any(covers(action, event) for action in actions) for event in used)
        exchanges = sorted((event for event in events if event["tid"] == 2 + rank), key=lambda event: event["ts"])
        assert [exchange["ts"] for exchange in exchanges] == [event["ts"] for event in used[::2]]
        for exchange, before, after in zip(exchanges, used[::2], used[1::2], strict=True):
            assert covers(exchange, before) and after["ts"] + 1 >= exchange["ts"] + exchange["dur"]
    picture = (tmp_path / "t.svg").read_text()
    assert "0, cp 1" in picture and "layer 1, backward: keys of rank 0" in picture and "waiting for it" in picture


def covers(outer, inner):
    """Whether one event lies in another, but for a microsecond."""
    return outer["ts"] <= inner["ts"] + 1 and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1


def test_one_rank_and_a_step_that_is_past(make, tmp_path, capsys):
    config = make(changes={"train.steps": 2, "train.trace": str(tmp_path / "t.json"), "train.trace_step": 2})
    pretrain(config)
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 1 + 2 * 4
    (tmp_path / "t.json").unlink()
    config.train.steps = 3
    pretrain(config)
    assert "no trace: this run goes on after step 2, and train.trace_step is 2" in capsys.readouterr().out
    assert not (tmp_path / "t.json").exists()


def test_a_trace_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    config = make(changes={"train.steps": 1, "train.trace": str(tmp_path / "file" / "t.json"), "train.trace_step": 1})
    with pytest.raises(RunError, match=r"train\.trace"):
        pretrain(config)


def test_medians_of_whole_and_split_backwards():
    times = Times(1.0, 2.0, 0.5)
    for name, expected in (("zbv", times), ("dualpipev", times), ("1f1b", Times(1.0, 2.5, 0.0))):
        measured = simulate(build_schedule(name, 2, 8, 1 if name == "1f1b" else 2), times)
        assert usual_times(measured) == pytest.approx(expected)


def test_the_trace_format():
    trace = chrome_trace(timeline_of([[("F", 0, 3, 10.0, 10.5)], [("W", 1, 3, 11.0, 11.25)]]))
    assert trace["traceEvents"][1]["name"] == str(Action("F", 0, 3)) == "0F3"
    assert {key: trace["traceEvents"][3][key] for key in ("ts", "dur", "tid", "cat")} == {
        "ts": 1e6,
        "dur": 250000.0,
        "tid": 1,
        "cat": "gradients of weights",
    }
