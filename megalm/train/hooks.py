"""What happens around the steps: logging, evaluation, early stopping, checkpoints. Each hook says when it acts."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megalm.checkpoint.sharded import LATEST
from megalm.checkpoint.state import save_checkpoint
from megalm.errors import writing
from megalm.log import log
from megalm.parallel import heartbeat
from megalm.train.metrics import Speed, SpeedMeter, peak_memory_bytes
from megalm.train.tracking import Tracker
from megalm.train.trainer import Hook, StepResult, Trainer, as_record, check_finite


class ProgressBar(Hook):
    """A bar on the console of rank 0; where there is no terminal, the log lines are enough."""

    def on_start(self, trainer: Trainer) -> None:
        state, total = trainer.state, trainer.config.train.steps
        self.bar = tqdm(
            total=total, initial=state.step, unit="step", disable=None if trainer.topology.rank == 0 else True
        )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.bar.update()

    def on_end(self, trainer: Trainer) -> None:
        self.bar.close()


class Logging(Hook):
    """Every step: check the numbers, add a line to metrics.jsonl; every `log_every`: speed and mean loss on the console."""

    def __init__(self, trackers: list[Tracker]):
        self.trackers = trackers
        self.file: TextIO | None = None
        self.speed: Speed | None = None  # as last measured

    def on_start(self, trainer: Trainer) -> None:
        self.losses: deque[float] = deque(maxlen=trainer.config.train.log_every)
        self.meter = SpeedMeter(trainer.config, trainer.topology.world_size, trainer.topology.device)
        if trainer.topology.rank == 0:
            path = Path(trainer.config.train.run_dir) / "metrics.jsonl"
            with writing(path):
                _cut_back(path, trainer.state.step)
                self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed in on_end

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        step, device = trainer.state.step, trainer.topology.device
        loss, norm = check_finite(step, result)
        self.meter.count_step()
        self.losses.append(loss)
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": None if result.skipped else norm,
            "tokens": trainer.state.consumed_tokens,
        }
        if result.loss_scale is not None:
            record |= {"loss_scale": result.loss_scale, "skipped": result.skipped}
        if step % trainer.config.train.log_every == 0 or step == trainer.config.train.steps:
            self.speed = speed = self.meter.read()
            memory = peak_memory_bytes(device)
            record |= {**vars(speed), "memory_bytes": memory, "time": time.time()}
            flops = f"{speed.tflops_per_rank:.3f} TFLOP/s per rank" + (f"  mfu {speed.mfu:.1%}" if speed.mfu else "")
            log(
                f"step {step:>6}  loss {self.recent_loss:.4f}  lr {result.lr:.2e}  grad norm {norm:.3f}  "
                f"{speed.tokens_per_second:,.0f} tokens/s  {flops}  {memory / 2**30:.2f} GiB"
            )
        self.write(record)

    @property
    def recent_loss(self) -> float:
        """Mean training loss of the last `log_every` steps of this process."""
        return sum(self.losses) / max(1, len(self.losses))

    def write(self, record: dict[str, Any]) -> None:
        """To metrics.jsonl and, what is one number, to every tracker, on rank 0."""
        if self.file is not None:
            with writing(Path(self.file.name)):
                self.file.write(json.dumps(record) + "\n")
            numbers = {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
            for tracker in self.trackers:
                tracker.log(numbers)

    def on_end(self, trainer: Trainer) -> None:
        if self.file is not None:
            self.file.close()
            for tracker in self.trackers:
                tracker.close()


class Evaluating(Hook):
    """Every `eval_every` steps: loss, perplexity and bits per byte on validation samples; stops after `patience` without gain."""

    def __init__(self, logging: Logging):
        self.logging = logging

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        config, state = trainer.config.train, trainer.state
        if not config.eval_every or state.step % config.eval_every:
            return
        start = time.perf_counter()
        with heartbeat.during("evaluate"):
            evaluation = trainer.evaluate()
        bits = f"  {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else ""
        log(
            f"step {state.step:>6}  validation loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}{bits}"
        )
        self.logging.write(as_record(state.step, evaluation))
        self.logging.meter.pause(time.perf_counter() - start)
        if state.best_valid_loss is None or evaluation.loss < state.best_valid_loss:
            state.best_valid_loss, state.evaluations_without_gain = evaluation.loss, 0
            return
        state.evaluations_without_gain += 1
        if state.is_out_of_patience(config.patience):
            state.stopped_early = True
            log(f"stopped early: {config.patience} evaluations without a better loss than {state.best_valid_loss:.4f}")


class Checkpointing(Hook):
    """Every `save_every` steps and after the last one, also if a signal made it that; with `save_first` before the first."""

    def __init__(self, config: dict[str, Any], logging: Logging):
        self.config, self.logging = config, logging
        self.resumed_step = self.saved_step = 0  # of the run's own newest checkpoint: when it started, and now
        self.seconds = 0.0  # that the last one took

    def on_start(self, trainer: Trainer) -> None:
        resumed = (self._root(trainer) / LATEST).is_file()  # from the very one: not to be replaced
        self.resumed_step = self.saved_step = trainer.state.step if resumed else 0
        if trainer.config.checkpoint.save_first and trainer.state.step == 0 and not resumed:
            self._save(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        step, every = trainer.state.step, trainer.config.checkpoint.save_every
        if trainer.is_done or trainer.interrupted or (every and step % every == 0):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        start = time.perf_counter()
        root, keep = self._root(trainer), trainer.config.checkpoint.keep
        with heartbeat.during("save"):
            folder = save_checkpoint(root, trainer.engine, trainer.state, self.config, keep)
        self.saved_step, self.seconds = trainer.state.step, time.perf_counter() - start
        log(f"step {trainer.state.step:>6}  saved {folder} in {self.seconds:.2f} s")
        self.logging.meter.pause(self.seconds)

    def _root(self, trainer: Trainer) -> Path:
        return Path(trainer.config.train.run_dir) / "checkpoints"


def _cut_back(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: the run goes back to its checkpoint and does them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the last line of a killed run may be cut
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(kept), encoding="utf-8")
    shorter.replace(path)
