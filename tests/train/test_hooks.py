"""When hooks act: logging, evaluation, early stopping, checkpoints; and what a stopped run leaves in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megalm.checkpoint.sharded import LATEST, find_checkpoint, read_manifest
from megalm.checkpoint.state import RunState
from megalm.train import hooks
from megalm.train.pretrain import pretrain
from megalm.train.trainer import Evaluation, Trainer


def saved(config) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(config.train.run_dir, "checkpoints").glob("step-*"))


class Stop(BaseException):
    """As sudden as a signal, but in this process."""


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch):
    """stop_in_step(config, 7): train, and break off inside step 7, after its update, before any hook has seen it."""

    def run(config, step: int) -> None:
        original = Trainer.train_step

        def train_step(trainer: Trainer):
            result = original(trainer)
            if trainer.state.step == step:
                raise Stop
            return result

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Trainer, "train_step", train_step)
            pretrain(config)
        dist.destroy_process_group()

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [20]),
        ({"checkpoint.save_every": 6}, [18, 20]),
        ({"checkpoint.save_every": 6, "checkpoint.keep": 0}, [6, 12, 18, 20]),
        ({"checkpoint.save_every": 10, "checkpoint.keep": 1}, [20]),
        ({"checkpoint.save_first": True, "checkpoint.keep": 0}, [0, 20]),
    ],
)
def test_which_checkpoints_there_are(changes: dict, expected: list[int], make) -> None:
    config = make("run", changes)
    pretrain(config)
    assert saved(config) == expected
    assert find_checkpoint(Path(config.train.run_dir)).name == "step-00000020"


def test_one_record_per_step_and_speed_in_some(make, records) -> None:
    config = make("run", {"train.log_every": 7})
    pretrain(config)
    found = records(config)
    assert [record["step"] for record in found] == list(range(1, 21))
    assert [record["tokens"] for record in found] == [64 * step for step in range(1, 21)]
    assert [record["step"] for record in found if "tokens_per_second" in record] == [7, 14, 20]
    assert all(record["tokens_per_second"] > 0 and record["memory_bytes"] > 2**20 for record in found if "time" in record)


@pytest.mark.parametrize(("step", "precision"), [(3, "fp32"), (5, "fp32"), (13, "fp32"), (20, "fp32"), (13, "bf16")])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(step: int, precision: str, make, records, stop_in_step) -> None:
    """Losses, gradient norms and evaluations, wherever it stopped; dropout and the order of the data go on as they were."""
    changes = {
        "checkpoint.save_every": 5, "train.eval_every": 4, "model.dropout": 0.1, "model.tie_embeddings": True,
        "train.precision": precision,
    }  # fmt: skip
    whole, broken = make("whole", changes), make("broken", changes)
    pretrain(whole)
    stop_in_step(broken, step)
    assert [r["step"] for r in records(broken)] == list(range(1, step))
    pretrain(broken)
    for key in ("loss", "valid_loss"):
        timeless = [[{k: r[k] for k in r if k not in SPEED} for r in records(c, key)] for c in (whole, broken)]
        assert timeless[0] == timeless[1]
    files = [find_checkpoint(Path(c.train.run_dir)) / "rank-00000.safetensors" for c in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


SPEED = ("seconds_per_step", "tokens_per_second", "tflops_per_rank", "mfu", "memory_bytes", "time")


def test_lines_after_the_checkpoint_are_cut_off(make, records, stop_in_step) -> None:
    """The run does steps 6 to 8 again; metrics.jsonl has them once, though a kill left half a line."""
    config = make("run", {"checkpoint.save_every": 5, "train.eval_every": 2})
    stop_in_step(config, 9)
    path = Path(config.train.run_dir, "metrics.jsonl")
    assert path.read_text().splitlines()[-1].startswith('{"step": 8, "valid')
    with open(path, "a") as file:
        file.write('{"step": 9, "lo')
    pretrain(config)
    assert [r["step"] for r in records(config)] == list(range(1, 21))
    assert [r["step"] for r in records(config, "valid_loss")] == list(range(2, 21, 2))


def test_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hooks._cut_back(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 3, 4)]
    path.write_text("\n".join([*lines, "{", '{"no": 1}', ""]))
    hooks._cut_back(path, 3)
    assert path.read_text().splitlines() == lines[:4]


def test_a_kill_while_cutting_back_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def stop(self: Path, target: Path) -> None:
        raise Stop

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(Stop):
        hooks._cut_back(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_that_goes_on_from_step_0_does_not_save_it_again(make, stop_in_step, records) -> None:
    """Its own `latest` names that checkpoint: replacing it would leave a moment without one."""
    config = make("run", {"checkpoint.save_first": True})
    stop_in_step(config, 2)
    manifest = Path(config.train.run_dir, "checkpoints", "step-00000000", "manifest.json")
    inode = manifest.stat().st_ino
    stop_in_step(config, 2)
    assert manifest.stat().st_ino == inode
    assert [r["step"] for r in records(config)] == [1]


def test_early_stopping(make, records, capsys: pytest.CaptureFixture) -> None:
    """A learning rate that ruins the model: the second evaluation without gain ends the run, and it stays ended."""
    changes = {"train.eval_every": 2, "train.patience": 2, "optim.lr": 3.0, "optim.warmup_steps": 0, "train.steps": 50}
    config = make("run", changes)
    pretrain(config)
    losses = [record["valid_loss"] for record in records(config, "valid_loss")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 25, "two evaluations after the best"
    assert "stopped early: 2 evaluations without a better loss" in capsys.readouterr().out
    state = read_manifest(find_checkpoint(Path(config.train.run_dir))).state
    assert state["stopped_early"] and state["step"] == 2 * len(losses) and state["best_valid_loss"] == min(losses)
    pretrain(config)
    assert "nothing to do" in capsys.readouterr().out
    assert len(records(config)) == 2 * len(losses)
    config = make("run", {**changes, "train.patience": 0, "train.steps": 2 * len(losses) + 1})
    pretrain(config)  # who asks for more gets more
    assert len(records(config)) == 2 * len(losses) + 1


@pytest.mark.parametrize(
    ("losses", "patience", "steps"),
    [
        ([3, 4, 2, 2.5, 2.2], 2, 5),  # a gain in between begins the count anew
        ([3, 3, 3], 2, 3),  # an equal loss is no gain
        ([3, 4, 5], 0, 0),
        ([3, 4], 1, 2),
    ],
)
def test_patience(losses: list[float], patience: int, steps: int) -> None:
    """With planned losses: the number of evaluations after which it stops; 0: it does not."""
    state, left = RunState(), iter(losses)
    evaluate = lambda: Evaluation(next(left), 1.0, None)  # noqa: E731
    train = SimpleNamespace(eval_every=1, patience=patience)
    trainer = SimpleNamespace(state=state, config=SimpleNamespace(train=train), evaluate=evaluate)
    logging = SimpleNamespace(write=lambda record: None, meter=SimpleNamespace(pause=lambda seconds: None))
    stopped = 0
    for state.step in range(1, len(losses) + 1):
        hooks.Evaluating(logging).after_step(trainer, None)  # type: ignore[arg-type]
        if state.stopped_early:
            stopped = state.step
            break
    assert stopped == steps
    assert state.best_valid_loss == min(losses)


def test_patience_counts_on_after_a_resumption(make, records, stop_in_step) -> None:
    changes = {"train.eval_every": 1, "train.patience": 4, "optim.lr": 3.0, "optim.warmup_steps": 0, "checkpoint.save_every": 1}
    whole, broken = make("whole", changes), make("broken", changes)
    pretrain(whole)
    last = len(records(whole))
    assert last < 20
    stop_in_step(broken, last - 1)
    pretrain(broken)
    assert [r["valid_loss"] for r in records(broken, "valid_loss")] == [r["valid_loss"] for r in records(whole, "valid_loss")]


def test_latest_is_the_last(make) -> None:
    config = make("run", {"checkpoint.save_every": 3, "train.steps": 10})
    pretrain(config)
    assert Path(config.train.run_dir, "checkpoints", LATEST).read_text() == "step-00000010\n"
