"""Experiment trackers by config: Weights & Biases and TensorBoard. Both are imported only when they are asked for."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Protocol

from megalm.config.run import RunConfig
from megalm.errors import ConfigError, Problem


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; `auto` is online if there is a key, else offline (files in RUN_DIR/wandb, `wandb sync` later)."""

    def __init__(self, config: RunConfig, resolved: dict[str, Any]):
        import wandb

        mode = config.tracking.wandb
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        self.run: Any = wandb.init(
            project=config.tracking.project,
            name=Path(config.train.run_dir).name,
            dir=config.train.run_dir,
            mode=mode,  # type: ignore[arg-type]
            config=resolved,
            settings=wandb.Settings(silent=True),
        )

    def log(self, record: dict[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
        self.run.log(values, step=record["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    """TensorBoard events in RUN_DIR/tensorboard."""

    def __init__(self, config: RunConfig):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            rule = "TensorBoard must be installed"
            raise ConfigError(
                Problem(
                    "tracking.tensorboard", True, rule, "", "pip install 'megalm[viz]', or tracking.tensorboard=false"
                )
            ) from error
        self.writer: Any = SummaryWriter(str(Path(config.train.run_dir) / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key not in ("step", "time") and value is not None:
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def build_trackers(config: RunConfig, resolved: dict[str, Any]) -> list[Tracker]:
    """The trackers that the config asks for; call on rank 0 only."""
    trackers: list[Tracker] = []
    if config.tracking.wandb != "off":
        trackers.append(WandbTracker(config, resolved))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(config))
    return trackers


def _has_wandb_key() -> bool:
    """A key in the environment or in ~/.netrc, without reading what it is."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
