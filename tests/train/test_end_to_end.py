"""Whole runs in several processes, as users start them: killed and resumed, moved to other layouts, under torchrun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.config.parallel import parse_layout
from megalm.errors import ExitCode

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def on(layout: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a layout."""
    values, copies = parse_layout(layout)
    ranks = copies * int(values.get("tensor_parallel", 1)) * int(values.get("pipeline_parallel", 1))  # type: ignore[call-overload]
    return {**{f"parallel.{key}": value for key, value in values.items()}, "cluster.num_processes": ranks, **(changes or {})}


def workers_of(launcher: int) -> list[int]:
    """Its children that are ranks; another is its guard."""
    children = [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    return [child for child in children if b"MEGALM_HEARTBEAT=" in Path(f"/proc/{child}/environ").read_bytes()]


def steps_done(run_dir: str) -> int:
    path = Path(run_dir, "metrics.jsonl")
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.parametrize(
    ("layout", "precision", "seed"), [("tp2", "fp32", 0), ("tp2_sp", "bf16", 1), ("pp2", "fp32", 2), ("dp2_zero2", "fp32", 3)]
)
def test_a_killed_run_goes_on_to_the_last_bit(
    layout: str, precision: str, seed: int, make, command, command_line, records
) -> None:
    """kill -9 of one worker at a random step; the same command again; every loss and norm is that of the unbroken run."""
    draw = random.Random(seed)
    settings = on(layout, {
        "checkpoint.save_every": 4, "train.eval_every": 5, "model.dropout": 0.1, "train.precision": precision, "train.steps": 40,
    })  # fmt: skip
    whole, broken = make("whole", settings), make("broken", settings)
    assert command(whole).returncode == 0
    launcher = subprocess.Popen(command_line(broken), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    target = draw.randrange(5, 30)
    while steps_done(broken.train.run_dir) < target:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.002)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    os.kill(draw.choice(workers), signal.SIGKILL)
    start = time.monotonic()
    _, message = launcher.communicate(timeout=240)
    assert launcher.returncode == 1 and "killed by SIGKILL" in message and "Traceback" not in message
    assert time.monotonic() - start < 60, "it is a matter of seconds, also on a busy machine"
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), "nobody is left"
    done = steps_done(broken.train.run_dir)
    assert target <= done < 40, "it was killed on the way"
    again = command(broken)
    assert again.returncode == 0, again.stderr
    assert f"at step {done // 4 * 4}" in again.stdout or f"at step {(done - 1) // 4 * 4}" in again.stdout
    for key in ("loss", "grad_norm", "valid_loss", "valid_bits_per_byte"):
        assert [(r["step"], r[key]) for r in records(broken, key)] == [(r["step"], r[key]) for r in records(whole, key)]


def test_a_checkpoint_moves_to_other_layouts(make, command, records) -> None:
    """What tp2_pp2_zero1 wrote goes on, on dp4_zero3 and on one rank, as it would have gone on where it was."""
    common = {"checkpoint.save_every": 10, "checkpoint.keep": 0, "optim.eps": 1e-6}
    whole = make("whole", on("tp2_pp2_zero1", common))
    done = command(whole)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in records(whole)]
    source = str(Path(whole.train.run_dir, "checkpoints", "step-00000010"))
    for layout in ("dp4_zero3", "single"):
        moved = make(layout, on(layout, {**common, "checkpoint.load": source}))
        done = command(moved)
        assert done.returncode == 0, done.stderr
        found = [record["loss"] for record in records(moved)]
        assert found == pytest.approx(losses[10:], abs=1e-6), layout


def test_evaluation_is_the_same_on_every_layout(make, command, records) -> None:
    found = {}
    for layout in ("single", "tp2_sp", "pp2", "dp2"):
        config = make(layout, on(layout, {"train.eval_every": 5, "train.steps": 5}))
        assert command(config).returncode == 0
        (record,) = records(config, "valid_loss")
        found[layout] = (record["valid_loss"], record["valid_bits_per_byte"])
    for layout, values in found.items():
        assert values == pytest.approx(found["single"], abs=1e-5), layout


def test_under_torchrun(make, command, command_line, records, tmp_path: Path) -> None:
    """Without our launcher: two processes of torchrun, started twice over one folder."""
    own, theirs = (make(name, on("tp2", {"train.steps": 6})) for name in ("own", "theirs"))
    assert command(own).returncode == 0
    (file,) = command_line(theirs)[-1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for said in ("done: step 6 of 6", "nothing to do"):
        done = subprocess.run(
            [*torchrun, "-m", "megalm.launchers.pretrain", file],
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(said) == 1, done.stdout
    assert [r["loss"] for r in records(theirs)] == [r["loss"] for r in records(own)]


def test_a_loss_that_explodes_on_two_ranks_is_said_once(make, command) -> None:
    done = command(make("run", on("dp2", {"optim.warmup_steps": 0, "optim.lr": 1e30, "optim.clip": 0.0})))
    assert done.returncode == ExitCode.HOPELESS
    assert done.stderr.count("must stay finite") == 1 and "on rank" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_port_in_use(make, command) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command(make("run", on("dp2", {"cluster.port": taken.getsockname()[1]})))
    assert done.returncode == 2 and "cluster.port" in done.stderr and "cluster.port=0" in done.stderr
    assert "Traceback" not in done.stderr
