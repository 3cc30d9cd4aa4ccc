"""Trackers get what metrics.jsonl gets, and are not imported unless they are asked for."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.errors import ConfigError
from megalm.train import tracking
from megalm.train.pretrain import pretrain


def test_no_tracker_by_default(make) -> None:
    config = make()
    assert tracking.build_trackers(config, {}) == []


def test_tensorboard_has_every_number(make, records) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make("run", {"tracking.tensorboard": True, "train.steps": 4, "train.eval_every": 2})
    pretrain(config)
    events = EventAccumulator(str(Path(config.train.run_dir, "tensorboard")))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "tokens", "valid_loss", "valid_bits_per_byte"):
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(key)]
        assert found == [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in records(config, key)]
    assert "mfu" not in events.Tags()["scalars"], "the peak of a CPU is not known"


def test_tensorboard_that_is_not_installed(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracking.tensorboard = True\n.*must be installed"):
        tracking.build_trackers(make("run", {"tracking.tensorboard": True}), {})


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_wandb_without_a_key_writes_a_run_folder(mode: str, make, no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[tuple[int, dict]] = []
    config = make("run", {"tracking.wandb": mode, "train.steps": 3})
    original = wandb.sdk.wandb_run.Run.log

    def log(run, values, step=None):
        logged.append((step, values))
        return original(run, values, step=step)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    pretrain(config)
    (file,) = Path(config.train.run_dir, "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
    assert [step for step, _ in logged] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm"} <= set(values) and "time" not in values for _, values in logged)


def test_a_key_is_looked_for_where_wandb_keeps_it(no_account: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tracking._has_wandb_key()
    (tmp_path / ".netrc").touch(mode=0o600)  # as wandb makes it; Python reads no other
    (tmp_path / ".netrc").write_text("machine example.org login a password b\n")
    assert not tracking._has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking._has_wandb_key()
    (tmp_path / ".netrc").write_text("nonsense here\n")
    assert not tracking._has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking._has_wandb_key()


def log_records(content: bytes) -> Iterator[bytes]:
    """Of a LevelDB log: blocks of 32 KiB, in them pieces with a head of checksum, length, and 1 whole, 2 first, 3, 4 last."""
    at, whole = 7, b""  # behind the file's own mark
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no head fits there
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history(run_dir: Path) -> list[tuple[str, list[int]]]:
    """(id, steps) of every file that W&B has written, in the order of the starts."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        name, steps = "", []
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
        found.append((name, steps))
    return found


def test_wandb_goes_on_with_the_same_run(make, no_account: None) -> None:
    """Two starts, in the second of which a setting has changed."""
    config = make("run", {"tracking.wandb": "offline", "train.steps": 3})
    pretrain(config)
    time.sleep(1.1)  # W&B names a start's folder by the second
    pretrain(make("run", {"tracking.wandb": "offline", "train.steps": 5}))
    kept = Path(config.train.run_dir, tracking.WANDB_ID).read_text().strip()
    assert history(Path(config.train.run_dir)) == [(kept, [1, 2, 3]), (kept, [4, 5])]
    other = make("other", {"tracking.wandb": "offline", "train.steps": 1})
    pretrain(other)
    ((new, _),) = history(Path(other.train.run_dir))
    assert new != kept


def test_wandb_gets_no_step_that_it_has(make, no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run that had reached step 7 when it was killed, and goes on from step 5."""
    sent: list[int] = []
    answer = SimpleNamespace(starting_step=8, log=lambda values, step: sent.append(step))
    asked: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **options: asked.update(options) or answer)
    config = make("run", {"tracking.wandb": "online"})
    Path(config.train.run_dir).mkdir()
    tracker = tracking.WandbTracker(config, {})
    assert asked["resume"] == "allow" and asked["id"] == Path(config.train.run_dir, tracking.WANDB_ID).read_text().strip()
    for step in (6, 7, 8, 9):
        tracker.log({"step": step, "loss": 1.0})
    assert sent == [8, 9]


@pytest.mark.parametrize("text", ["", "../../x", "a b", "x" * 65, "$(id)"])
def test_an_id_that_is_none_is_replaced(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    path = tmp_path / tracking.WANDB_ID
    path.write_text(text)
    new = tracking._keep_id(path)
    assert new != text and new == tracking._keep_id(path) == path.read_text().strip()
    path.unlink()
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert tracking._keep_id(path) == "mine"


def test_tensorboard_shows_no_step_twice(make, records) -> None:
    """Killed at step 5 behind the checkpoint of step 4, which is simulated: what a start wrote of step 5 is dropped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"tracking.tensorboard": True, "train.steps": 4}
    config = make("run", changes)
    pretrain(config)
    lost = tracking.TensorBoardTracker(config, 4)
    for step in (5, 6):
        lost.log({"step": step, "loss": 99.0})
    lost.close()
    time.sleep(1.1)  # TensorBoard reads the files in the order of their names, which hold the second
    pretrain(make("run", changes | {"train.steps": 7}))
    events = EventAccumulator(str(Path(config.train.run_dir, "tensorboard")))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("loss")]
    assert found == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records(config)]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6, 7]
