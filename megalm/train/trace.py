"""`pretrain trace=FILE.json`: one step as the pipeline ranks of copy 0 ran it, for chrome://tracing and as a picture.

Where ranks share a sample by a ring, each of them has a row, and below it what the ring did: whose keys and values it computed
with, and when the next ones were on their way.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megalm.errors import writing
from megalm.log import log
from megalm.parallel.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from megalm.parallel.ring import RingAttention
from megalm.parallel.schedule_picture import NAMES, Mark, Panel, save_picture
from megalm.parallel.timeline import Span, Timeline, Times, simulate
from megalm.train.trainer import Hook, StepResult, Trainer

_SOURCES = ("#2563eb", "#c2410c", "#15803d", "#7e22ce")  # by the rank whose keys and values they are
_WAY, _WAIT = "#94a3b8", "#dc2626"
Record = tuple[str, int, int, float, float]  # kind, stage, microbatch, start, end


class Hop(NamedTuple):
    """One step of a ring in one layer; seconds."""

    layer: str
    kind: str  # F or B
    source: int
    start: float
    computed: float
    arrived: float
    is_last: bool  # of its round: the keys and values go no further


class Row(NamedTuple):
    """What one rank did in the traced step."""

    pipeline: int
    context: int
    records: list[Record]
    hops: list[Hop]


class Tracing(Hook):
    """Before step `trace_step`: start the clocks of all ranks together; after it: gather, write, draw."""

    def on_start(self, trainer: Trainer) -> None:
        train, step = trainer.config.train, trainer.state.step
        self.runs = False
        if train.trace and step >= train.trace_step:
            log(f"no trace: this run goes on after step {step}, and train.trace_step is {train.trace_step}")
        self._start_clock(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.runs:
            self._write(trainer)
            self.runs, trainer.job.executor.record = False, None
            for ring in rings_of(trainer).values():
                ring.record = None
        self._start_clock(trainer)

    def _start_clock(self, trainer: Trainer) -> None:
        """Machines' clocks differ, so times count from a barrier."""
        train, topology = trainer.config.train, trainer.topology
        self.runs = bool(train.trace) and trainer.state.step + 1 == train.trace_step
        if not self.runs:
            return
        if topology.batch.is_first and topology.tensor.is_first:
            trainer.job.executor.record = []
            for ring in rings_of(trainer).values():
                ring.record = []
        if topology.world_size > 1:
            dist.barrier()
        self.zero = time.monotonic()

    def _write(self, trainer: Trainer) -> None:
        topology, zero, record = trainer.topology, self.zero, trainer.job.executor.record
        mine: Row | None = None
        if record is not None:
            records = [(kind, stage, m, start - zero, end - zero) for kind, stage, m, start, end in record]
            last = (topology.context.rank + 1) % topology.context.size
            hops = [
                Hop(layer, hop.kind, hop.source, hop.start - zero, hop.computed - zero, hop.arrived - zero, hop.source == last)
                for layer, ring in rings_of(trainer).items()
                for hop in ring.record or ()
            ]
            mine = Row(topology.pipeline.rank, topology.context.rank, records, hops)
        gathered: list[Any] = [mine] * topology.world_size
        if topology.world_size > 1:
            dist.gather_object(mine, gathered if topology.rank == 0 else None, 0)
        if topology.rank == 0:
            _save(trainer, sorted((row for row in gathered if row is not None), key=lambda row: row[:2]))


def rings_of(trainer: Trainer) -> dict[str, RingAttention]:
    """This rank's, by the number of their layer."""
    attends = {name: getattr(module, "attend", None) for name, module in trainer.job.chunks.named_modules()}
    rings = {name: ring for name, ring in attends.items() if isinstance(ring, RingAttention)}
    return {name.rpartition("layers.")[2].partition(".")[0]: ring for name, ring in rings.items()}


def _save(trainer: Trainer, rows: Sequence[Row]) -> None:
    """The trace and its picture, on rank 0."""
    path, shared = trainer.config.train.trace, trainer.topology.context.size > 1
    measured = timeline_of([row.records for row in rows])
    simulated = simulate(trainer.job.executor.schedule, usual_times(measured))
    with writing(Path(path), "train.trace"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(chrome_trace(measured, rows, shared)), encoding="utf-8")
    picture = str(Path(path).with_suffix(".svg"))
    name, names = trainer.config.parallel.schedule, tuple(f"{row.pipeline}, cp {row.context}" for row in rows) if shared else ()
    title = f"{name}, step {trainer.state.step} as measured: bubble {measured.bubble:.1%}"
    marks = tuple(tuple(marks_of(row.hops)) for row in rows) if any(row.hops for row in rows) else ()
    panels = [
        Panel(title, measured, "s", names, marks, legend_of(rows)),
        Panel(f"{name} as simulated with the median times of that step: bubble {simulated.bubble:.1%}", simulated, "s"),
    ]
    save_picture(picture, panels, "train.trace")
    bubbles = f"bubble {measured.bubble:.1%} measured, {simulated.bubble:.1%} simulated with its median times"
    log(f"step {trainer.state.step:>6}  {bubbles}; traced in {path}, drawn in {picture}")


def timeline_of(records: Sequence[Sequence[Record]]) -> Timeline:
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


def marks_of(hops: Sequence[Hop]) -> list[Mark]:
    """Of one rank: above whose keys and values it computed with, below when the next ones were on their way, and waited for."""
    marks = []
    for layer, kind, source, start, computed, arrived, is_last in hops:
        where = f"layer {layer}, {NAMES[kind]}"
        marks.append(Mark(0, start, computed, _SOURCES[source % len(_SOURCES)], f"{where}: keys of rank {source}"))
        if not is_last:
            marks.append(Mark(1, start, computed, _WAY, f"{where}: exchange on its way"))
        marks.append(Mark(1, computed, arrived, _WAIT, f"{where}: waiting for the exchange"))
    return marks


def legend_of(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """What the marks' colours mean; of no ring, nothing."""
    sources = sorted({hop.source for row in rows for hop in row.hops})
    if not sources:
        return ()
    colours = [_SOURCES[source % len(_SOURCES)] for source in sources]
    blocks = [(c, f"attention with keys and values of context rank {s}") for c, s in zip(colours, sources, strict=True)]
    return (*blocks, (_WAY, "the exchange on its way"), (_WAIT, "waiting for it"))


def chrome_trace(timeline: Timeline, rows: Sequence[Row] = (), shared: bool = False) -> dict[str, Any]:
    """The format of chrome://tracing and ui.perfetto.dev; a thread is a pipeline rank, times are microseconds.

    shared: there are several context ranks. A ring's steps lie within their action, its exchanges on a thread of their own.
    """
    events: list[dict[str, Any]] = []

    def add(name: str, category: str, thread: int, start: float, end: float, **args: object) -> None:
        place = {"name": name, "cat": category, "ph": "X", "pid": 0, "tid": thread}
        events.append({**place, "ts": (start - timeline.start) * 1e6, "dur": (end - start) * 1e6, "args": args})

    def name_thread(thread: int, name: str) -> None:
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}})

    for number, spans in enumerate(timeline.spans):
        row = rows[number] if rows else Row(number, 0, [], [])
        name = f"pipeline rank {row.pipeline}" + f", context rank {row.context}" * shared
        name_thread(number, name)
        for action, start, end in spans:
            add(str(action), NAMES[action.kind], number, start, end, stage=action.stage, microbatch=action.microbatch)
        if row.hops:
            name_thread(len(timeline.spans) + number, f"{name}: keys and values on their way")
        for layer, _, source, start, computed, arrived, is_last in row.hops:
            add(f"keys of rank {source}", "ring", number, start, computed, layer=layer)
            add("wait", "ring", number, computed, arrived, layer=layer)
            if not is_last:
                add("exchange", "ring", len(timeline.spans) + number, start, arrived, layer=layer)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
