"""A run that is asked to stop finishes its step, saves, and ends with ExitCode.SAVED; the same command goes on from there."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megalm.log import log
from megalm.parallel.signals import StopRequest
from megalm.runfolder import note_event
from megalm.train.trainer import Hook, StepResult, Trainer


class Stopping(Hook):
    """Before the first step and after every one: the ranks agree whether one of them was asked. Stands before Checkpointing.

    A scheduler's signal reaches the ranks at different times, some of them perhaps never. They must all leave after the same
    step, so they reduce one number: a rank that left alone would hang the others in their next collective.
    """

    def __init__(self, stop: StopRequest):
        self.stop = stop

    def on_start(self, trainer: Trainer) -> None:
        self._agree(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if not trainer.is_done:  # then there is nothing to come back for
            self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        asked = bool(self.stop.signal)
        if trainer.topology.world_size > 1:
            flag = torch.tensor(int(asked), device=trainer.topology.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            asked = bool(flag)  # sync
        if not asked:
            return
        trainer.interrupted = True
        step, name = trainer.state.step, self.stop.signal or "a signal to another rank"
        log(f"step {step:>6}  asked to stop ({name})")
        if trainer.topology.rank == 0:
            note_event(Path(trainer.config.train.run_dir), "stopping", step=step, signal=self.stop.signal)
