"""A run that is asked to stop saves and comes back as if nothing had been; what it says of itself in its folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from megalm.checkpoint.sharded import find_checkpoint
from megalm.errors import ExitCode, RunError
from megalm.parallel.signals import ASKING, StopRequest
from megalm.runfolder import finished_step, is_finished, note_finished, read_events, read_progress
from megalm.train import hooks
from megalm.train.pretrain import pretrain
from megalm.train.trainer import Trainer

SPEED = ("seconds_per_step", "tokens_per_second", "tflops_per_rank", "mfu", "memory_bytes", "time")


@pytest.fixture
def signal_in_step(monkeypatch: pytest.MonkeyPatch):
    """signal_in_step(config, 7, SIGUSR1): train, and get the signals in the middle of step 7; returns the exit code."""

    def run(config, step: int, *numbers: int) -> ExitCode:
        original = Trainer._count

        def count(trainer: Trainer, batches):
            if trainer.state.step == step - 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(trainer, batches)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_count", count)
            return pretrain(config)

    return run


def saved(config) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(config.train.run_dir, "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", ASKING)
def test_a_stopped_run_that_comes_back_is_the_unbroken_run_to_the_last_bit(number, make, records, signal_in_step) -> None:
    changes = {"checkpoint.save_every": 5, "train.eval_every": 4, "model.dropout": 0.1}
    whole, broken = make("whole", changes), make("broken", changes)
    assert pretrain(whole) == ExitCode.FINISHED
    assert signal_in_step(broken, 8, number) == ExitCode.SAVED  # that step's evaluation takes place before
    assert saved(broken)[-1] == 8 and not is_finished(Path(broken.train.run_dir))
    assert [r["step"] for r in records(broken)] == list(range(1, 9))
    assert pretrain(broken) == ExitCode.FINISHED
    for key in ("loss", "valid_loss"):
        timeless = [[{k: r[k] for k in r if k not in SPEED} for r in records(c, key)] for c in (whole, broken)]
        assert timeless[0] == timeless[1]
    files = [find_checkpoint(Path(c.train.run_dir)) / "rank-00000.safetensors" for c in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_run_says_of_itself(make, signal_in_step) -> None:
    config = make("run", {"checkpoint.save_every": 5})
    run_dir = Path(config.train.run_dir)
    signal_in_step(config, 7, signal.SIGTERM)
    progress = read_progress(run_dir)
    assert progress is not None and (progress.step, progress.steps, progress.saved_step, progress.tokens) == (7, 20, 7, 7 * 64)
    assert progress.loss is not None and progress.loss > 0 and abs(progress.time - time.time()) < 60
    pretrain(config)
    progress = read_progress(run_dir)
    assert progress is not None and (progress.step, progress.saved_step) == (20, 20) and progress.tokens_per_second
    told = [(event["kind"], event["step"]) for event in read_events(run_dir)]
    first = [("started", 0), ("saved", 5), ("stopping", 7), ("saved", 7)]
    assert told == [*first, ("started", 7), ("saved", 10), ("saved", 15), ("saved", 20), ("finished", 20)]
    events = list(read_events(run_dir))
    assert events[0]["hosts"] == [socket.gethostname()] and (events[0]["ranks"], events[0]["attempt"]) == (1, "0")
    assert events[2]["signal"] == "SIGTERM" and finished_step(run_dir, 20, 0) == 20


def test_a_run_that_was_asked_before_its_first_step_does_none(make) -> None:
    config, stop = make("run"), StopRequest()
    stop.signal = "SIGUSR1"
    assert pretrain(config, stop) == ExitCode.SAVED
    assert saved(config) == [] and not Path(config.train.run_dir, "metrics.jsonl").read_text()


def test_a_run_that_is_asked_in_its_last_step_is_finished(make, signal_in_step) -> None:
    config = make("run", {"train.steps": 3})
    assert signal_in_step(config, 3, signal.SIGUSR1) == ExitCode.FINISHED
    assert saved(config) == [3] and is_finished(Path(config.train.run_dir))


def test_a_signal_in_the_middle_of_a_save_does_not_break_it(make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, original = make("run", {"checkpoint.save_every": 5, "checkpoint.keep": 0}), hooks.save_checkpoint

    def save(root, engine, state, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(root, engine, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "save_checkpoint", save)
        assert pretrain(config) == ExitCode.SAVED
    assert saved(config) == [5, 6]
    assert pretrain(config) == ExitCode.FINISHED


def test_a_second_interrupt_ends_at_once(make, signal_in_step) -> None:
    config = make("run")
    with pytest.raises(KeyboardInterrupt):
        signal_in_step(config, 4, signal.SIGINT, signal.SIGINT)
    assert saved(config) == []


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == "SIGUSR1"
    assert [signal.getsignal(number) for number in ASKING] == before


def test_a_failure_is_told_and_a_refusal_is_not(make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("run", {"optim.warmup_steps": 0, "optim.lr": 1e30, "optim.clip": 0.0})
    with pytest.raises(RunError):
        pretrain(config)
    failed = [event for event in read_events(Path(config.train.run_dir)) if event["kind"] == "failed"]
    assert len(failed) == 1 and (failed[0]["reason"], failed[0]["rank"]) == ("run error", 0)
    assert "must stay finite" in failed[0]["message"]


def test_finished_means_this_goal(tmp_path: Path) -> None:
    assert finished_step(tmp_path, 20, 0) is None
    note_finished(tmp_path, 12, 20, 3)
    assert [finished_step(tmp_path, *goal) for goal in ((20, 3), (30, 3), (20, 0))] == [12, None, None]
    (tmp_path / "finished").write_text("[1]")
    assert finished_step(tmp_path, 20, 3) is None and is_finished(tmp_path)


def test_more_steps_for_a_finished_run(make) -> None:
    pretrain(make("run", {"train.steps": 2}))
    config = make("run", {"train.steps": 4})
    assert pretrain(config) == ExitCode.FINISHED
    assert finished_step(Path(config.train.run_dir), 4, 0) == 4


def test_command_line_a_finished_run_ends_without_torch(make, command_line, tmp_path: Path) -> None:
    config = make("run", {"train.steps": 4})
    pretrain(config)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise SystemExit('torch was imported')")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    done = subprocess.run(command_line(config), env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "already at step 4 of 4" in done.stdout) == (0, True), done.stderr


@pytest.mark.dist
def test_ranks_that_are_signalled_at_different_times_leave_after_one_step(make, command_line, records) -> None:
    """Only rank 1 is asked. Both save the same step, and end with the code that says: come again."""
    config = make("run", {"train.steps": 100000, "cluster.num_processes": 2, "parallel.tensor_parallel": 2})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(command_line(config), env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    run_dir, deadline = Path(config.train.run_dir), time.monotonic() + 90
    while time.monotonic() < deadline and ((progress := read_progress(run_dir)) is None or progress.step < 3):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(60) for rank in ranks] == [ExitCode.SAVED, ExitCode.SAVED]
    progress = read_progress(run_dir)
    assert progress is not None and saved(config) == [progress.step] and len(records(config)) == progress.step
