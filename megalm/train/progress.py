"""What a run says of itself in its folder: progress.json, events.jsonl and `finished` (see runfolder.py). Rank 0 writes."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.errors import MegalmError, writing
from megalm.parallel import heartbeat
from megalm.parallel.workers import this_attempt, this_host
from megalm.runfolder import FINISHED, Progress, note_event, note_finished, read_progress, write_progress
from megalm.train.hooks import Checkpointing, Logging
from megalm.train.trainer import Hook, StepResult, Trainer

_SECONDS = 1.0  # between two versions of progress.json; a checkpoint is told at once


class Beating(Hook):
    """After every step and what belongs to it: a sign of life for the agent. Stands last."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        heartbeat.end_step(trainer.state.step)

    def on_end(self, trainer: Trainer) -> None:
        heartbeat.say("end", trainer.state.step)


class Reporting(Hook):
    """At the start, after every step (a file at most once a second) and at the end. Stands last: it tells what others did."""

    def __init__(self, logging: Logging, checkpointing: Checkpointing):
        self.logging, self.checkpointing = logging, checkpointing
        self.written, self.saved_step = 0.0, 0

    def on_start(self, trainer: Trainer) -> None:
        topology = trainer.topology
        hosts: list[Any] = [None] * topology.world_size
        dist.gather_object(this_host(), hosts if topology.rank == 0 else None, 0)
        self.saved_step = self.checkpointing.resumed_step
        if topology.rank:
            return
        run_dir = Path(trainer.config.train.run_dir)
        details = {"step": trainer.state.step, "steps": trainer.config.train.steps, "attempt": this_attempt()}
        if (before := read_progress(run_dir)) is not None:
            details["reached"] = before.step  # by the start before: what lies behind `step` is done again
        details |= {"ranks": topology.world_size, "hosts": list(dict.fromkeys(hosts)), "job": os.environ.get("SLURM_JOB_ID")}
        with writing(run_dir):
            (run_dir / FINISHED).unlink(missing_ok=True)  # it was, with fewer steps
            note_event(run_dir, "started", pid=os.getpid(), **details)
        self._tell(trainer, at_once=True)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._tell(trainer)

    def on_end(self, trainer: Trainer) -> None:
        with suppress(MegalmError):  # an error that ends the run is not to be hidden by this one
            self._tell(trainer, at_once=True)

    def finish(self, trainer: Trainer) -> None:
        """The run has done its last step."""
        if trainer.topology.rank == 0:
            run_dir, train = Path(trainer.config.train.run_dir), trainer.config.train
            with writing(run_dir):
                note_finished(run_dir, trainer.state.step, train.steps, train.patience)
                note_event(run_dir, "finished", step=trainer.state.step, attempt=this_attempt())

    def _tell(self, trainer: Trainer, at_once: bool = False) -> None:
        if trainer.topology.rank:
            return
        run_dir, now = Path(trainer.config.train.run_dir), time.monotonic()
        if self.checkpointing.saved_step != self.saved_step:
            self.saved_step, at_once = self.checkpointing.saved_step, True
            with writing(run_dir):
                note_event(run_dir, "saved", step=self.saved_step, seconds=round(self.checkpointing.seconds, 3))
        if at_once or now - self.written >= _SECONDS:
            self.written, speed = now, self.logging.speed
            with writing(run_dir):
                write_progress(
                    run_dir,
                    Progress(
                        trainer.state.step,
                        trainer.config.train.steps,
                        self.saved_step,
                        time.time(),
                        this_attempt(),
                        self.logging.losses[-1] if self.logging.losses else None,
                        trainer.state.consumed_tokens,
                        speed.tokens_per_second if speed is not None else None,
                    ),
                )


def note_failure(run_dir: Path, error: Exception, rank: int) -> None:
    """Where no agent does it: why a start ended. A refusal is none: nothing ran."""
    if "MEGALM_HEARTBEAT" in os.environ or (isinstance(error, MegalmError) and error.exit_code == 2):
        return
    text = str(error.problems[0]).replace("\n", "; ") if isinstance(error, MegalmError) else str(error)
    reason = error.kind if isinstance(error, MegalmError) else type(error).__name__
    with suppress(OSError):  # the disk may be what has failed; the error itself is raised
        note_event(run_dir, "failed", reason=reason, message=text[:500], rank=rank, host=this_host(), attempt=this_attempt())
