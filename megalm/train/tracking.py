"""Experiment trackers by config: Weights & Biases and TensorBoard. Both are imported only when they are asked for."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from pathlib import Path
from typing import Any, Protocol

from megalm.config.run import RunConfig
from megalm.errors import ConfigError, Problem, writing

WANDB_ID = "wandb-id"  # in the run's folder
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; `auto` is online if there is a key, else offline (files in RUN_DIR/wandb; later: `wandb sync`).

    All starts of a run are one run there: its id is kept in RUN_DIR/wandb-id. Steps that the run goes back over are not sent
    again where W&B has them already: it takes steps in rising order only, and a run that goes back repeats them exactly.
    """

    def __init__(self, config: RunConfig, resolved: dict[str, Any]):
        import wandb

        mode = config.tracking.wandb
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        self.run: Any = wandb.init(
            project=config.tracking.project,
            id=_keep_id(Path(config.train.run_dir) / WANDB_ID),
            resume="allow",
            allow_val_change=True,  # more steps than before, for example
            name=Path(config.train.run_dir).name,
            dir=config.train.run_dir,
            mode=mode,  # type: ignore[arg-type]
            config=resolved,
            settings=wandb.Settings(silent=True),
        )
        self.first_step = int(self.run.starting_step)  # where W&B goes on; 0 offline, which asks no server

    def log(self, record: dict[str, Any]) -> None:
        if record["step"] >= self.first_step:
            values = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
            self.run.log(values, step=record["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    """TensorBoard events in RUN_DIR/tensorboard, a file for each start.

    `step`: what the run has behind it. TensorBoard drops what earlier starts wrote of later steps: they are done again.
    """

    def __init__(self, config: RunConfig, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            rule = "TensorBoard must be installed"
            raise ConfigError(
                Problem(
                    "tracking.tensorboard", True, rule, "", "pip install 'megalm[viz]', or tracking.tensorboard=false"
                )
            ) from error
        self.writer: Any = SummaryWriter(str(Path(config.train.run_dir) / "tensorboard"), purge_step=step + 1)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key not in ("step", "time") and value is not None:
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def build_trackers(config: RunConfig, resolved: dict[str, Any], step: int = 0) -> list[Tracker]:
    """The trackers that the config asks for; call on rank 0 only. `step`: the one that the run goes on from."""
    trackers: list[Tracker] = []
    if config.tracking.wandb != "off":
        trackers.append(WandbTracker(config, resolved))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(config, step))
    return trackers


def _keep_id(path: Path) -> str:
    """The run's id at W&B: the one in the file, else that of the environment, else a new one, which is then kept."""
    if path.is_file() and _ID.fullmatch(found := path.read_text(encoding="utf-8", errors="replace").strip()):
        return found
    new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    with writing(path):
        path.write_text(new + "\n", encoding="utf-8")
    return new


def _has_wandb_key() -> bool:
    """A key in the environment or in ~/.netrc, without reading what it is."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
