"""What every rank has to say about a step, in one file of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.config.parallel import layout_name
from megalm.errors import writing
from megalm.train.trainer import Trainer


def gather_report(trainer: Trainer, file: str, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's part, by rank, on rank 0, which writes them to `file` in the run's folder; elsewhere empty. Collective."""
    topology, config = trainer.topology, trainer.config
    gathered: list[Any] = [None] * topology.world_size
    dist.gather_object(mine, gathered if topology.rank == 0 else None, 0)
    if topology.rank:
        return []
    path = Path(config.train.run_dir) / file
    layout = layout_name(config.parallel, topology.batch.size)
    with writing(path):
        path.write_text(json.dumps({"step": trainer.state.step, "layout": layout, "ranks": gathered}, indent=1) + "\n")
    return gathered
