"""What becomes of a job: every row of the table, and what survives between the starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ConfigError, ExitCode
from megalm.launchers.slurm import history
from megalm.launchers.slurm.decide import Action, Start, verdict, what_next
from megalm.launchers.slurm.history import History
from megalm.runfolder import Progress, write_progress

FAILED, REFUSED, HOPELESS, SAVED = ExitCode.FAILED, ExitCode.REFUSED, ExitCode.HOPELESS, ExitCode.SAVED
END, AGAIN = Action.END, Action.AGAIN


@pytest.mark.parametrize(
    ("codes", "together"),
    [
        ([0, 0], 0),
        ([0, SAVED], SAVED),
        ([SAVED, SAVED], SAVED),
        ([SAVED, -9], FAILED),
        ([-9, HOPELESS, -9], HOPELESS),
        ([1, REFUSED], REFUSED),
        ([REFUSED, HOPELESS], HOPELESS),
        ([137, 0], FAILED),
        ([], FAILED),
    ],
)
def test_one_code_for_all_ranks(codes: list[int], together: int) -> None:
    assert verdict(codes) == together


@pytest.mark.parametrize(
    ("start", "before", "starts", "action", "code", "failures"),
    [
        (Start(0), 2, 1, END, 0, 0),
        (Start(FAILED, finished=True), 2, 1, END, 0, 0),  # the last step is done, and then a rank died
        (Start(SAVED, asked=True), 2, 1, AGAIN, SAVED, 2),
        (Start(SAVED, asked=True, progressed=True), 2, 1, AGAIN, SAVED, 0),
        (Start(FAILED, asked=True), 2, 1, AGAIN, SAVED, 2),  # preempted, and not saved in time: not the run's fault
        (Start(FAILED, asked=True, timed_out=True), 1, 2, AGAIN, FAILED, 2),  # the next one would get no further
        (Start(FAILED, asked=True, timed_out=True), 2, 3, END, FAILED, 3),
        (Start(FAILED, asked=True, timed_out=True, progressed=True), 2, 3, AGAIN, SAVED, 0),
        (Start(SAVED, asked=True, timed_out=True), 2, 3, AGAIN, SAVED, 2),
        (Start(FAILED, asked=True, timed_out=True, can_save=False), 0, 1, END, FAILED, 0),
        (Start(FAILED, asked=True, can_save=False), 0, 1, AGAIN, SAVED, 0),
        (Start(SAVED), 2, 1, AGAIN, SAVED, 2),
        (Start(SAVED, asked=True, cancelled=True), 0, 1, END, SAVED, 0),
        (Start(FAILED), 0, 1, AGAIN, FAILED, 1),
        (Start(FAILED), 1, 2, AGAIN, FAILED, 2),
        (Start(FAILED), 2, 3, END, FAILED, 3),  # the third in a row
        (Start(FAILED, progressed=True), 2, 3, AGAIN, FAILED, 0),  # it had saved: a new row begins
        (Start(REFUSED), 0, 1, END, REFUSED, 0),
        (Start(REFUSED, progressed=True), 0, 1, AGAIN, FAILED, 0),  # it was good enough to train with
        (Start(REFUSED), 0, 5, AGAIN, FAILED, 1),  # a disk that is not mounted, a GPU that is gone
        (Start(REFUSED), 2, 7, END, FAILED, 3),
        (Start(HOPELESS, asked=True), 0, 1, END, HOPELESS, 0),
        (Start(bad_nodes=("n2",)), 2, 3, AGAIN, FAILED, 2),  # the node's fault
        (Start(bad_nodes=("n1", "n2"), all_bad=True), 2, 3, END, FAILED, 3),  # not the nodes' fault
        (Start(SAVED, asked=True), 0, 50, END, FAILED, 0),  # slurm.max_starts
        (Start(bad_nodes=("n2",)), 0, 50, END, FAILED, 0),
    ],
)
def test_what_next(start: Start, before: int, starts: int, action: Action, code: int, failures: int) -> None:
    decision = what_next(start, before, starts, max_failures=3, max_starts=50)
    assert (decision.action, decision.code, decision.failures) == (action, code, failures)
    assert decision.reason


def test_a_bad_node_is_left_out() -> None:
    assert what_next(Start(bad_nodes=("n2",)), 0, 1, 3, 50).exclude == ("n2",)
    assert what_next(Start(bad_nodes=("n2",), all_bad=True), 0, 1, 3, 50).exclude == ()


def test_a_start_whose_node_was_lost_has_failed(tmp_path: Path) -> None:
    past = History(starts=1, failures=1, saved_step=5, running=True)
    write_progress(tmp_path, Progress(step=7, steps=9, saved_step=5, time=0.0))
    history.begin(past, tmp_path)
    assert (past.failures, past.starts, past.running) == (2, 2, True)
    write_progress(tmp_path, Progress(step=8, steps=9, saved_step=8, time=0.0))
    history.begin(past, tmp_path)
    assert (past.failures, past.saved_step) == (0, 8)
    history.begin(replace(past, running=False, failures=2), tmp_path)
    assert past.failures == 0


def test_history_is_kept_per_submission(tmp_path: Path) -> None:
    past = History(starts=3, failures=2, excluded=["n2"], verdict=1)
    history.write_history(tmp_path, "a", past)
    assert history.read_history(tmp_path, "a") == past
    assert history.read_history(tmp_path, "b") == History()
    (tmp_path / "slurm" / "history-a.json").write_text("{half")
    assert history.read_history(tmp_path, "a") == History()


def test_who_goes_on_with_what(tmp_path: Path) -> None:
    """The same job, the next of its chain, and the script submitted again by hand."""
    going = History(starts=2, failures=1)
    history.write_history(tmp_path, "s", going)
    history.hold(tmp_path, ["7", "8"], "login1")
    assert history.take_up(tmp_path, "s", "7") == (going, None)
    assert history.take_up(tmp_path, "s", "9") == (History(), None)
    ended = replace(going, verdict=3, ended_by="7", excluded=["n2"])
    history.write_history(tmp_path, "s", ended)
    assert history.take_up(tmp_path, "s", "8") == (ended, 3)
    assert history.take_up(tmp_path, "s", "7") == (History(excluded=["n2"]), None)


def test_two_jobs_on_one_folder(tmp_path: Path) -> None:
    history.hold(tmp_path, ["7", "8"], "login1")
    history.check_holder(tmp_path, ["8"], lambda job: job == "8")
    history.check_holder(tmp_path, [], lambda job: False)
    with pytest.raises(ConfigError, match=r"job 7, 8 of .* submitted on login1"):
        history.check_holder(tmp_path, [], lambda job: True)
