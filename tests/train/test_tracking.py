"""Trackers get what metrics.jsonl gets, and are not imported unless they are asked for."""

from __future__ import annotations

import sys
from pathlib import Path

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
