"""What the trainer writes is what `megalm status` and `megalm report` read: a real run of two starts."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from megalm.observe.curves import marks_of
from megalm.observe.folder import read_run
from megalm.observe.overview import as_text, look
from megalm.observe.page import render
from megalm.observe.starts import starts_of, times_of
from megalm.observe.verdict import is_alive, judge
from megalm.runfolder import read_progress, write_progress
from megalm.train.pretrain import pretrain


def test_a_real_run_is_read(make) -> None:
    """Its second start finds a checkpoint of step 4, and progress.json of step 6: as after a kill."""
    changes = {"train.steps": 4, "train.log_every": 2, "train.eval_every": 2}
    config = make("run", changes)
    folder = Path(config.train.run_dir)
    pretrain(config)
    progress = read_progress(folder)
    assert progress is not None and progress.step == 4
    write_progress(folder, replace(progress, step=6))
    pretrain(make("run", changes | {"train.steps": 8}))
    run = read_run(folder)
    starts = starts_of(run)
    assert [(start.first_step, start.last_step) for start in starts] == [(0, 6), (4, 8)]
    assert [mark.x for mark in marks_of(starts)] == [4]
    assert is_alive(run) is True and run.events[0]["pid"] == os.getpid()
    verdict = judge(run, time.time(), is_alive(run))
    assert (verdict.state, run.step, run.steps, run.notes) == ("finished", 8, 8, [])
    times = times_of(run, starts, runs_on=True)
    assert times is not None and times.effective is not None and 0 < times.effective <= 1 and times.saving > 0
    assert {"loss", "lr", "grad_norm", "valid_loss", "tokens_per_second", "memory_bytes"} <= set(run.columns)
    assert len(run.column("loss")) == 8 and run.memory["step"] == 3 and run.checkpoints == [4, 8]
    page = render(run, run, time.time(), None)
    assert all(text in page for text in ("2 steps done again", "Learning rate", "Memory", "Beside its parent"))
    assert "FINISHED" in as_text(look(read_run(folder, metrics=False), time.time(), None), 5, time.time(), colour=False)
