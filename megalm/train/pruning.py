"""A run that is a point of a sweep: what came of it, and an early end if the search that started it has given it up.

The two talk through files in the run's folder (see runfolder.py): the search reads metrics.jsonl and, if other points were
better at the same step, puts a file `prune` there. So workers know nothing of the search's library, and a search that is
killed loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.checkpoint.state import RunState
from megalm.config.run import RunConfig
from megalm.errors import writing
from megalm.log import log, this_rank
from megalm.runfolder import POINT, PRUNE, Result, note_event, read_result, write_result
from megalm.train.hooks import Logging
from megalm.train.trainer import Hook, StepResult, Trainer

METRICS = "metrics.jsonl"


class Pruning(Hook):
    """After every evaluation, or where nothing is evaluated every `log_every` steps. Stands before Checkpointing."""

    def __init__(self, logging: Logging):
        self.logging = logging
        self.in_sweep = self.pruned = False

    def on_start(self, trainer: Trainer) -> None:
        self.in_sweep = _rank_0_sees(trainer, POINT)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        train = trainer.config.train
        if not self.in_sweep or trainer.is_done or trainer.state.step % (train.eval_every or train.log_every):
            return
        if _rank_0_sees(trainer, PRUNE):
            self.pruned = trainer.state.stopped_early = True
            log(f"step {trainer.state.step:>6}  given up by the search: other points were better by then")

    def finish(self, trainer: Trainer) -> None:
        """The run is over: write result.json, if somebody has asked for it."""
        if not self.in_sweep or trainer.topology.rank:
            return
        best, status = trainer.state.best_valid_loss, "pruned" if self.pruned else "finished"
        run_dir, value = Path(trainer.config.train.run_dir), self.logging.recent_loss if best is None else best
        with writing(run_dir):
            write_result(run_dir, Result(value, trainer.state.step, status, "loss" if best is None else "valid_loss"))
            if self.pruned:
                note_event(run_dir, "pruned", step=trainer.state.step)


def leave_result(config: RunConfig, state: RunState) -> None:
    """Of a run that is at its end and was killed before it could write result.json, or has only now become a point."""
    run_dir = Path(config.train.run_dir)
    if this_rank() or not (run_dir / POINT).exists() or read_result(run_dir) is not None:
        return
    value, metric = state.best_valid_loss, "valid_loss"
    if value is None:
        losses = {record["step"]: record["loss"] for record in _records(run_dir) if "loss" in record}
        recent = [losses[step] for step in sorted(losses)[-config.train.log_every :]]
        value, metric = sum(recent) / max(1, len(recent)), "loss"
    with writing(run_dir):
        write_result(run_dir, Result(value, state.step, "finished", metric))


def _records(run_dir: Path) -> Iterator[dict[str, Any]]:
    with suppress(OSError), open(run_dir / METRICS, encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # half written
                yield json.loads(line)


def _rank_0_sees(trainer: Trainer, name: str) -> bool:
    """Whether the run's folder holds a file, by rank 0: a shared disk may show it to others later."""
    seen = trainer.topology.rank == 0 and (Path(trainer.config.train.run_dir) / name).exists()
    flag = torch.tensor(int(seen), device=trainer.topology.device)
    dist.broadcast(flag, 0)
    return bool(flag)  # sync
