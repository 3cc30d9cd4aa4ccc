"""Messages of a run: rank 0 speaks on the console, every rank writes to its own log file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_file: TextIO | None = None


def this_rank() -> int:
    """The global rank as the launcher (torchrun, srun, our own) told it; 0 outside of one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def open_log(folder: Path) -> None:
    """Also write every message of this rank to `folder/rank-N.log`."""
    global _file
    folder.mkdir(parents=True, exist_ok=True)
    _file = open(folder / f"rank-{this_rank()}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed in close_log


def close_log() -> None:
    """Close the log file, if one is open."""
    global _file
    if _file is not None:
        _file.close()
        _file = None


def log(message: str) -> None:
    """Say something once: on the console if this is rank 0, and in this rank's log file."""
    if this_rank() == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
    if _file is not None:
        _file.write(message + "\n")
