"""`train.memory_step=N`: the peak memory of step N, measured on every rank and held against what was predicted at the start."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megalm.log import log
from megalm.parallel import heartbeat
from megalm.parallel.memory_meter import MemoryMeter
from megalm.train.forecast import predict_memory
from megalm.train.hooks import Logging
from megalm.train.rank_report import gather_report
from megalm.train.trainer import Hook, StepResult, Trainer

FILE = "memory.json"
KINDS = 24  # of tensors alive at the peak, the largest


class Measuring(Hook):
    """Around step `memory_step`. On a GPU its allocator tells; on a CPU a meter counts tensors, which makes this step slower.

    Such a step is left out of the speed that `logging` reports. A run that goes on behind the step measures nothing.
    Skipped steps of fp16 do not count: before the first update there are no moments.
    """

    def __init__(self, logging: Logging) -> None:
        self.logging = logging
        self.meter: MemoryMeter | None = None

    def before_step(self, trainer: Trainer) -> None:
        if _updates(trainer) + 1 != trainer.config.train.memory_step:
            return
        device = trainer.topology.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.since = time.perf_counter()
            heartbeat.say("measure", trainer.state.step)  # the step takes longer than others, and its rank has not hung
            self.meter = MemoryMeter(device)
            self.meter.start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        meter = self._stop()
        if _updates(trainer) == trainer.config.train.memory_step and not result.skipped:
            _report(trainer, meter)
        if meter is not None:
            self.logging.meter.leave_out(time.perf_counter() - self.since)

    def on_end(self, trainer: Trainer) -> None:
        self._stop()  # if the step broke off

    def _stop(self) -> MemoryMeter | None:
        meter, self.meter = self.meter, None
        if meter is not None:
            meter.stop()
        return meter


def _updates(trainer: Trainer) -> int:
    """Steps that changed the weights."""
    return trainer.state.step - trainer.state.skipped_steps


def _report(trainer: Trainer, meter: MemoryMeter | None) -> None:
    """Every rank's numbers to rank 0, which writes them and shows those of the fullest. Collective."""
    topology, config = trainer.topology, trainer.config
    predicted = predict_memory(config)[topology.pipeline.rank]
    states, parts = predicted.states, {"activations": predicted.activations, "temporary": predicted.temporary}
    measured = torch.cuda.max_memory_allocated(topology.device) if meter is None else meter.peak
    mine: dict[str, Any] = {"rank": topology.rank, "pipeline": topology.pipeline.rank, "measured": measured}
    mine |= {"predicted": predicted.total, "parts": asdict(states) | parts}
    mine["alive"] = [asdict(alive) for alive in meter.alive()[:KINDS]] if meter is not None else []
    if ranks := gather_report(trainer, FILE, mine):
        log(f"step {trainer.state.step:>6}  {compare(ranks)}; all ranks: {Path(config.train.run_dir) / FILE}")


def compare(ranks: list[dict[str, Any]]) -> str:
    """One line: the fullest rank, and the one whose prediction is furthest off."""
    full = max(ranks, key=lambda r: r["measured"])
    worst = max(ranks, key=lambda r: abs(_off(r)))
    line = f"peak memory {full['measured'] / 2**30:.3g} GiB on rank {full['rank']} of {len(ranks)}, predicted {_percent(full)}"
    return line if worst is full or len(ranks) == 1 else f"{line}; furthest off on rank {worst['rank']}, {_percent(worst)}"


def _off(rank: dict[str, Any]) -> float:
    """How much too much was predicted, as a share of what was measured."""
    return rank["predicted"] / rank["measured"] - 1


def _percent(rank: dict[str, Any]) -> str:
    return f"{rank['predicted'] / 2**30:.3g} GiB ({_off(rank):+.1%})"
