"""What a run does before its first step: start, resume, refuse. In this process, then through the command line."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from megalm.checkpoint.sharded import LATEST, find_checkpoint
from megalm.checkpoint.state import RunState
from megalm.errors import CheckpointError, ConfigError, DataError, ExitCode, RunError
from megalm.runfolder import read_events
from megalm.testing import run_distributed
from megalm.train import pretrain as module
from megalm.train.pretrain import find_source, pretrain


def test_a_finished_run_says_so_and_changes_nothing(make, capsys: pytest.CaptureFixture) -> None:
    config = make("run", {"train.steps": 3})
    pretrain(config)
    paths = [path for path in Path(config.train.run_dir).rglob("*") if path.is_file() and path.suffix != ".log"]
    files = {path: path.read_bytes() for path in paths}
    pretrain(config)
    assert "already at step 3 of 3" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files


def test_a_finished_run_goes_on_when_asked_for_more(make, records, capsys: pytest.CaptureFixture) -> None:
    pretrain(make("run", {"train.steps": 3}))
    config = make("run", {"train.steps": 5})
    pretrain(config)
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4, 5]
    assert "resumed from" in capsys.readouterr().out


def test_the_resolved_config_is_saved_with_the_run(make) -> None:
    config = make("run", {"train.steps": 1, "model.rope_theta": 500.0})
    pretrain(config)
    saved = yaml.safe_load(Path(config.train.run_dir, "config.yaml").read_text())
    assert saved["model"]["rope_theta"] == 500.0 and saved["model"]["ffn_size"] == 128
    assert saved["cluster"]["num_processes"] == 1


def test_load_starts_from_another_runs_checkpoint(make, records) -> None:
    first = make("first", {"train.steps": 10, "optim.schedule": "constant"})
    pretrain(first)
    second = make("second", {"train.steps": 12, "optim.schedule": "constant", "checkpoint.load": first.train.run_dir})
    pretrain(second)
    whole = make("whole", {"train.steps": 12, "optim.schedule": "constant"})
    pretrain(whole)
    assert [r["loss"] for r in records(second)] == [r["loss"] for r in records(whole)][10:]


def test_the_runs_own_checkpoint_comes_before_load(make, tmp_path: Path) -> None:
    config = make("run", {"train.steps": 2})
    assert find_source(config, tmp_path / "run") is None
    pretrain(config)
    config.checkpoint.load = str(tmp_path / "other")
    assert find_source(config, tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match="train first"):
        find_source(config, tmp_path / "elsewhere")


def test_a_checkpoint_of_another_model_names_the_keys(make) -> None:
    pretrain(make("run", {"train.steps": 1}))
    with pytest.raises(CheckpointError) as caught:
        pretrain(make("run", {"model.num_layers": 3, "model.hidden_size": 64}))
    assert [p.key for p in caught.value.problems] == ["model.hidden_size", "model.num_layers"]


@pytest.mark.parametrize("changes", [{"data.seq_length": 8}, {"data.seed": 1}, {"data.split": "0.9,0.1,0"}])
def test_other_data_is_refused(changes: dict, make) -> None:
    """Sample numbers would mean other samples."""
    pretrain(make("run", {"train.steps": 1}))
    with pytest.raises(CheckpointError, match="another split, seed or sequence length"):
        pretrain(make("run", changes))


def test_a_damaged_checkpoint_is_refused_and_an_older_one_can_be_named(make, records) -> None:
    config = make("run", {"checkpoint.save_every": 5, "train.steps": 10})
    pretrain(config)
    config.train.steps, root = 12, Path(config.train.run_dir, "checkpoints")
    shard = find_checkpoint(root) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="CRC-32"):
        pretrain(config)
    dist.destroy_process_group()
    (root / LATEST).write_text("step-00000005")
    pretrain(config)
    assert [record["step"] for record in records(config)] == list(range(1, 13))


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_damaged_corpus(end: str, make, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus.parent, tmp_path / "data")
    path = tmp_path / "data" / f"corpus{end}"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=str(path)):
        pretrain(make("run", {"data.path": str(tmp_path / "data" / "corpus")}))


def test_a_run_folder_that_cannot_be_made(make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train.run_dir = .*file/run"):
        pretrain(make("file/run"))


# --- the same through `megalm pretrain`, as a user meets it: exit code, one message, no traceback --------------------


def test_command_line_run_and_rerun(make, command, records) -> None:
    config = make("run", {"train.steps": 4, "train.log_every": 2})
    done = command(config)
    assert done.returncode == 0, done.stderr
    for part in ("llama 50,080 parameters", "layout single on 1 x cpu", "step      4  loss", "done: step 4 of 4"):
        assert part in done.stdout
    assert len(records(config)) == 4
    again = command(config)
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stderr


def test_command_line_bad_input_is_exit_2(make, command, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus.parent, tmp_path / "data")
    (tmp_path / "data" / "corpus.bin").write_bytes(b"\x00" * 10)
    damaged = command(make("damaged", {"data.path": str(tmp_path / "data" / "corpus")}))
    pretrain(make("run", {"train.steps": 1}))
    other_model = command(make("run", {"model.num_layers": 3, "model.ffn_size": 64, "model.expert_ffn_size": 64}))
    (tmp_path / "file").write_text("")
    no_folder = command(make("other"), f"train.run_dir={tmp_path}/file/run")
    for done, parts in (
        (damaged, ["data error", "corpus.bin", "truncated"]),
        (other_model, ["checkpoint error", "model.num_layers = 3", "model.ffn_size = 64", "fix:     model.num_layers=2"]),
        (no_folder, ["config error", "1. train.run_dir = ", "Not a directory"]),
    ):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        for part in parts:
            assert done.stderr.count(part) == 1, f"{part}, once: {done.stderr}"


def test_command_line_a_loss_that_explodes_is_exit_3(make, command) -> None:
    done = command(make("run", {"optim.warmup_steps": 0, "optim.lr": 1e30, "optim.clip": 0.0}))
    assert done.returncode == ExitCode.HOPELESS
    assert "run error" in done.stderr and "must stay finite" in done.stderr and "step 2" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def start_from(rank: int, world_size: int, steps: list[int]) -> str:
    try:
        module._check_same_start(RunState(step=steps[rank]), torch.device("cpu"))
    except RunError as error:
        return str(error)
    return "same"


@pytest.mark.dist
def test_ranks_that_find_different_checkpoints_do_not_start() -> None:
    """Each machine with a run folder of its own, say: some ranks would resume and the others begin."""
    assert run_distributed(start_from, 2, [7, 7]) == ["same", "same"]
    assert all("found steps 0 to 7" in error for error in run_distributed(start_from, 2, [0, 7]))


def test_a_full_disk_is_named(make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("run", {"train.steps": 2})

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr("megalm.checkpoint.sharded.save_file", refuse)
    with pytest.raises(RunError, match="cannot write weights: No space left on device"):
        pretrain(config)
    assert not Path(config.train.run_dir, "checkpoints", LATEST).exists()


def test_two_runs_cannot_share_a_folder(make, records) -> None:
    config = make("run", {"train.steps": 1})
    Path(config.train.run_dir).mkdir(parents=True)
    with module.lock_folder(Path(config.train.run_dir)), pytest.raises(ConfigError, match="another run is writing there"):
        pretrain(config)
    assert not Path(config.train.run_dir, "metrics.jsonl").exists()
    pretrain(config)
    assert len(records(config)) == 1


@pytest.mark.parametrize(("attempt", "job"), [("0.1", ""), ("1", ""), ("1.0", "7"), ("0.0", "8")])
def test_a_later_start_waits_for_the_one_before_it(
    attempt: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes may be on their way out. That they are not is no mistake in the command, which was accepted before.

    The next job of a chain counts its starts anew.
    """
    monkeypatch.setenv("MEGALM_ATTEMPT", attempt)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    held = module.lock_folder(tmp_path)
    monkeypatch.setattr(module, "_HANDOVER_SECONDS", 0.5)
    with pytest.raises(RunError, match="another run is writing there"):
        module.lock_folder(tmp_path)
    monkeypatch.setattr(module, "_HANDOVER_SECONDS", 60.0)
    threading.Timer(0.5, held.close).start()
    module.lock_folder(tmp_path).close()


def test_a_run_that_was_killed_before_its_first_checkpoint_was_the_latest(make, records, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is on the disk but the last word: it goes on from there."""
    config = make("run", {"train.steps": 4, "checkpoint.save_every": 2})
    replace = os.replace

    def stop(source, target) -> None:
        if Path(target).name == LATEST:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        pretrain(config)
    dist.destroy_process_group()
    assert not Path(config.train.run_dir, "checkpoints", LATEST).exists()
    assert find_source(config, Path(config.train.run_dir)).name == "step-00000002"
    pretrain(config)
    assert [event["step"] for event in read_events(Path(config.train.run_dir)) if event["kind"] == "started"] == [0, 2]
    assert find_checkpoint(Path(config.train.run_dir)).name == "step-00000004"


def test_checkpoints_without_a_latest_are_not_buried(make) -> None:
    config = make("run", {"train.steps": 2})
    pretrain(config)
    Path(config.train.run_dir, "checkpoints", LATEST).unlink()
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        pretrain(config)
    assert caught.value.problems[0].fix.startswith("echo step-00000002 > ")


@pytest.mark.parametrize(("loss", "said"), [(2.0, "well below"), (2.8, "below"), (3.5, "not yet below")])
def test_the_yardstick_of_a_loss(loss: float, said: str) -> None:
    assert module._side(loss, 3.0) == said


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    module.lock_folder(tmp_path).close()
    assert "is not locked (No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", [True, False])
def test_the_deterministic_mode_begins_before_the_device_is_touched(wanted: bool, make, monkeypatch) -> None:
    order: list[str] = []
    start = module.start_process_group
    monkeypatch.setattr(module, "be_deterministic", lambda: order.append("deterministic"))
    monkeypatch.setattr(module, "start_process_group", lambda *given: (order.append("start"), start(*given))[1])
    pretrain(make("run", {"train.steps": 1, "train.deterministic": wanted}))
    assert order == ["deterministic"] * wanted + ["start"]
