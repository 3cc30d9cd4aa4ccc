"""Where the time of a run went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.observe.folder import Run, read_run
from megalm.observe.starts import starts_of, times_of

MakeRun = Callable[..., Path]


def test_three_starts(make_run: MakeRun) -> None:
    starts = starts_of(read_run(make_run()))
    assert [(s.attempt, s.first_step, s.last_step, s.kind) for s in starts] == [
        ("0.0", 0, 400, "stopping"),
        ("1.0", 400, 760, "failed"),
        ("1.1", 700, 1000, "finished"),
    ]
    assert [s.seconds for s in starts] == pytest.approx([205.4, 186.0, 156.0])
    assert starts[1].ending == "failed: rank died; rank 3 ended with signal 9; rank 3, host node2"
    assert starts[2].hosts == ["node1", "node3"]


def test_the_parts_of_the_time(make_run: MakeRun) -> None:
    """656 s in all: 1000 steps of 0.5 s; ten checkpoints of 0.4 s; 54.6 s and 54 s without a start."""
    run = read_run(make_run())
    times = times_of(run, starts_of(run), runs_on=True)
    assert times is not None
    assert times.wall == pytest.approx(656)
    assert times.counted == pytest.approx(500)
    assert times.saving == pytest.approx(4)
    assert times.between == pytest.approx(54.6 + 54)
    assert times.other == pytest.approx(656 - 500 - 4 - 108.6)
    assert times.effective == pytest.approx(500 / 656)


def test_steps_that_will_be_done_again_do_not_count(make_run: MakeRun) -> None:
    run = read_run(make_run())
    run.progress["saved_step"] = 900.0
    times = times_of(run, starts_of(run), runs_on=False)
    assert times is not None and times.counted == pytest.approx(450)


def test_the_next_start_knows_how_far_the_last_one_came(make_run: MakeRun) -> None:
    run = read_run(make_run())
    run.events = [event for event in run.events if event["kind"] == "started"]
    run.events[2]["reached"] = 755
    assert [s.last_step for s in starts_of(run)] == [None, 755, 1000]


def test_a_start_that_went_away_without_a_word(make_run: MakeRun) -> None:
    run = read_run(make_run())
    run.events = [event for event in run.events if event["kind"] in ("started", "saved")]
    starts = starts_of(run)
    assert [s.ending for s in starts] == ["went away without a word", "went away without a word", ""]
    assert starts[1].ended == pytest.approx(1_790_000_000 + 260 + 5 + 150.4)  # its last checkpoint
    assert starts[2].last_step == 1000


def test_steps_of_another_run_do_not_count() -> None:
    """It began at step 500, with another run's checkpoint, and does 100 steps of 2 s."""
    events = [{"kind": "started", "time": 1000.0, "step": 500}, {"kind": "finished", "time": 1400.0, "step": 600}]
    run = Run(Path("r"), events=events, columns={"seconds_per_step": [(550.0, 2.0), (600.0, 2.0)]})
    times = times_of(run, starts_of(run), runs_on=True)
    assert times is not None and (times.counted, times.wall) == (200, 400)
    run.columns["seconds_per_step"] = [(600.0, 9.0)]  # more than there was
    times = times_of(run, starts_of(run), runs_on=True)
    assert times is not None and (times.counted, times.other, times.effective) == (400, 0, 1)


def test_a_run_without_events(make_run: MakeRun) -> None:
    run = read_run(make_run())
    run.events = []
    times = times_of(run, starts_of(run), runs_on=True)
    assert times is not None and times.wall == pytest.approx(650) and times.between == 0  # loading is not known of
    assert times_of(Run(Path("r")), [], runs_on=True) is None


def test_clocks_that_disagree() -> None:
    events = [
        {"kind": "started", "time": 100.0, "step": 0},
        {"kind": "failed", "time": 500.0},
        {"kind": "started", "time": 300.0},
    ]
    run = Run(Path("r"), events=events)
    times = times_of(run, starts_of(run), runs_on=True)
    assert times is not None
    assert times.between == 0 and times.other >= 0 and times.wall == 200
