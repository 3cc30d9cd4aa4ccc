"""`pretrain trace=FILE.json`: one step as the pipeline ranks of copy 0 ran it, for chrome://tracing and as a picture."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.errors import writing
from megalm.log import log
from megalm.parallel.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from megalm.parallel.schedule_picture import NAMES, Panel, save_picture
from megalm.parallel.timeline import Span, Timeline, Times, simulate
from megalm.train.trainer import Hook, StepResult, Trainer


class Tracing(Hook):
    """Before step `trace_step`: start the clock of every pipeline rank together; after it: gather, write, draw."""

    def on_start(self, trainer: Trainer) -> None:
        train, step = trainer.config.train, trainer.state.step
        if train.trace and step >= train.trace_step:
            log(f"no trace: this run goes on after step {step}, and train.trace_step is {train.trace_step}")
        self._start_clock(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.job.executor.record is not None:
            self._write(trainer)
            trainer.job.executor.record = None
        self._start_clock(trainer)

    def _start_clock(self, trainer: Trainer) -> None:
        """Machines' clocks differ, so times count from a barrier."""
        train, topology = trainer.config.train, trainer.topology
        if not train.trace or trainer.state.step + 1 != train.trace_step or topology.data.rank or topology.tensor.rank:
            return
        if topology.pipeline.size > 1:
            dist.barrier(topology.pipeline.handle)
        self.zero = time.monotonic()
        trainer.job.executor.record = []

    def _write(self, trainer: Trainer) -> None:
        record, group = trainer.job.executor.record, trainer.topology.pipeline
        mine = [(kind, stage, m, start - self.zero, end - self.zero) for kind, stage, m, start, end in record or []]
        gathered: list[Any] = [mine]
        if group.size > 1:
            gathered = [None] * group.size
            dist.gather_object(mine, gathered if group.is_first else None, group.ranks[0], group.handle)
        if not group.is_first:
            return
        measured, schedule, path = timeline_of(gathered), trainer.job.executor.schedule, trainer.config.train.trace
        simulated = simulate(schedule, usual_times(measured))
        with writing(Path(path), "train.trace"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(chrome_trace(measured)), encoding="utf-8")
        picture = str(Path(path).with_suffix(".svg"))
        name = trainer.config.parallel.schedule
        panels = [
            Panel(f"{name}, step {trainer.state.step} as measured: bubble {measured.bubble:.1%}", measured, "s"),
            Panel(f"{name} as simulated with the median times of that step: bubble {simulated.bubble:.1%}", simulated, "s"),
        ]
        save_picture(picture, panels, "train.trace")
        bubbles = f"bubble {measured.bubble:.1%} measured, {simulated.bubble:.1%} simulated with its median times"
        log(f"step {trainer.state.step:>6}  {bubbles}; traced in {path}, drawn in {picture}")


def timeline_of(records: Sequence[Sequence[tuple[str, int, int, float, float]]]) -> Timeline:
    """By rank (kind, stage, microbatch, start, end) in seconds -> what the pictures draw."""
    return Timeline(tuple(tuple(Span(Action(*record[:3]), *record[3:]) for record in rank) for rank in records))


def usual_times(timeline: Timeline) -> Times:
    """Medians over all ranks, seconds. Where the backward is never split, all of it counts as gradients of inputs."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for spans in timeline.spans:
        for span in spans:
            found[span.action.kind].append(span.end - span.start)
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    if INPUT in medians:
        return Times(medians[FORWARD], medians[INPUT], medians[WEIGHT])
    return Times(medians[FORWARD], medians[BACKWARD], 0.0)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The format of chrome://tracing and ui.perfetto.dev; a thread is a pipeline rank, times are microseconds."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.spans):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}})
        for action, start, end in spans:
            times = {"ts": (start - timeline.start) * 1e6, "dur": (end - start) * 1e6}
            place = {"name": str(action), "cat": NAMES[action.kind], "ph": "X", "pid": 0, "tid": rank}
            events.append({**place, **times, "args": {"stage": action.stage, "microbatch": action.microbatch}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
