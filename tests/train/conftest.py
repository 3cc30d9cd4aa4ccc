"""A small corpus, small runs on it, in this process or through the command line, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from megalm.config.data import DataConfig, PrepareConfig
from megalm.config.model import ModelConfig
from megalm.config.optim import OptimConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.data.tokenize import prepare

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher around us, no GPU, one thread, and no process group left by a run that was stopped."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.set_num_threads(1)  # the models are too small for two
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "MEGALM_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of about 4,000 tokens of very regular text."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i in range(60):
        lines = [f"def f{i}_{j}(x, y):\n    return x * {i} + y * {j}\n" for j in range(4)]
        (folder / "text" / f"{i}.py").write_text("\n".join(lines))
    prepare(PrepareConfig(source=str(folder / "text"), output=str(folder / "data"), vocab_size=300))
    return folder / "data" / "corpus"


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """make(name of the run folder, {"section.key": value}): a llama of 40,000 weights and 20 steps."""

    def configure(run: str = "run", changes: dict[str, Any] | None = None) -> RunConfig:
        config = RunConfig(
            model=ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_length=32),
            data=DataConfig(path=str(corpus), seq_length=16, split="0.8,0.2,0"),
            optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3),
            train=TrainConfig(run_dir=str(tmp_path / run), steps=20, global_batch_size=4, micro_batch_size=1, eval_samples=8),
        )
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            assert hasattr(getattr(config, section), name), key
            setattr(getattr(config, section), name, value)
        return config

    return configure


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """command(config, "key=value", ...): `megalm pretrain` on it in processes of its own."""

    def run(config: RunConfig, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*start(config, tmp_path), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )

    return run


def start(config: RunConfig, folder: Path) -> list[str]:
    """The command line of a run, whose configuration is written to a file."""
    path = folder / f"{Path(config.train.run_dir).name}.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    return [sys.executable, "-m", "megalm.launchers.cli", "pretrain", str(path)]


@pytest.fixture
def command_line(tmp_path: Path) -> Callable[[RunConfig], list[str]]:
    """What `command` would run."""
    return lambda config: start(config, tmp_path)


@pytest.fixture
def records() -> Callable[..., list[dict[str, Any]]]:
    """records(config, "loss"): the lines of metrics.jsonl that have such a value."""

    def read(config: RunConfig, key: str = "loss") -> list[dict[str, Any]]:
        lines = Path(config.train.run_dir, "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if key in record]

    return read
