"""The files through which a run, whoever starts and restarts it, and whoever watches it know of each other. No torch.

    progress.json   where the run is, by rank 0, at most once a second; replaced whole, so a reader never sees half of it
    events.jsonl    what happened: starts, checkpoints, failures, restarts, excluded machines; one line each, only added to
    finished        the run has done its last step; whoever starts it again has nothing to do
    logs/           what each start printed

A run that is a point of a sweep has more:
    point.json      its settings and its command, by whoever started the sweep
    prune           put there by a search: the point is not worth going on with
    result.json     what came of it
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROGRESS, EVENTS, FINISHED = "progress.json", "events.jsonl", "finished"
POINT, PRUNE, RESULT = "point.json", "prune", "result.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is. Steps are optimizer steps; times are seconds since the epoch."""

    step: int
    steps: int  # the last one
    saved_step: int  # of the newest complete checkpoint; 0: none
    time: float
    attempt: str = "0"  # SLURM's restart and the agent's, as "2.1"
    loss: float | None = None
    tokens: int = 0  # consumed
    tokens_per_second: float | None = None


def replace_file(path: Path, text: str) -> None:
    """Write a file anew, so that a reader sees the old one or the new one, never half of it. Raises OSError."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    new.unlink(missing_ok=True)
    with open(new, "x", encoding="utf-8") as file:  # x: not through a link that leads elsewhere
        file.write(text)
    new.replace(path)


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Replace progress.json. Raises OSError."""
    replace_file(run_dir / PROGRESS, json.dumps(asdict(progress)) + "\n")


def read_progress(run_dir: Path) -> Progress | None:
    """None where no run has written one yet, or what is there is not one."""
    try:
        values = json.loads((run_dir / PROGRESS).read_text(encoding="utf-8"))
        return Progress(**values)
    except (OSError, ValueError, TypeError):
        return None


def note_event(run_dir: Path, kind: str, **details: Any) -> None:
    """Add a line to events.jsonl: {"time", "kind", **details}. Several machines may: a line is one write, in append mode.

    kinds: started, saved, stopping, failed, stalled, restarted, requeued, excluded, gave_up, pruned, finished.
    """
    line = json.dumps({"time": time.time(), "kind": kind, **details}, default=str) + "\n"
    handle = os.open(run_dir / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """In order; a line that is cut off is left out."""
    try:
        text = (run_dir / EVENTS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            yield event


def is_finished(run_dir: Path) -> bool:
    return (run_dir / FINISHED).exists()


def note_finished(run_dir: Path, step: int, steps: int, patience: int) -> None:
    """Say that nothing is left to do, and of which goal: `train.steps` and `train.patience`. Raises OSError."""
    said = {"step": step, "steps": steps, "patience": patience, "time": time.time()}
    replace_file(run_dir / FINISHED, json.dumps(said) + "\n")


def finished_step(run_dir: Path, steps: int, patience: int) -> int | None:
    """The last step of a run that has reached this very goal; None if it has not, had another one, or owes a sweep its result."""
    if (run_dir / POINT).exists() and not (run_dir / RESULT).exists():
        return None
    try:
        found = json.loads((run_dir / FINISHED).read_text(encoding="utf-8"))
        return int(found["step"]) if (found["steps"], found["patience"]) == (steps, patience) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Result:
    """What came of a point of a sweep."""

    value: float  # nats per token: the best validation loss, or where nothing was evaluated the recent training loss
    step: int
    status: str  # finished or pruned
    metric: str = "loss"  # or valid_loss


def write_result(run_dir: Path, result: Result) -> None:
    """Replace result.json. Raises OSError."""
    replace_file(run_dir / RESULT, json.dumps(asdict(result)) + "\n")


def read_result(run_dir: Path) -> Result | None:
    """None where there is none yet."""
    try:
        values = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        return Result(float(values["value"]), int(values["step"]), str(values["status"]), str(values["metric"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
