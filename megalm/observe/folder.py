"""A run as its folder tells it: config, metrics, events, progress, memory, checkpoints. Whatever is missing is empty."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megalm.errors import ConfigError, Problem
from megalm.observe.lines import read_lines, read_object
from megalm.observe.words import number
from megalm.runfolder import EVENTS, FINISHED, PROGRESS

METRICS, CONFIG, MEMORY = "metrics.jsonl", "config.yaml", "memory.json"
_SIGNS = (METRICS, CONFIG, EVENTS, PROGRESS)  # a folder with one of them is a run's
_LEAVES, _DEPTH, _CONFIG_BYTES = 2000, 4, 1 << 20
_EVENTS = 100_000  # the last ones
_REPORTS = ("logs/report-*.txt", "logs/*/report-*.txt")
_FAILURES, _FAILURE_BYTES = 10, 1 << 16  # the newest reports; of each
_STEP = re.compile(r"step-(\d{1,15})")

Points = list[tuple[float, float]]


@dataclass
class Run:
    """What is known of a run. Times are seconds since the epoch."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    columns: dict[str, Points] = field(default_factory=dict)  # of metrics.jsonl: name -> (step, value), steps rising
    loads: dict[str, list[float]] = field(default_factory=dict)  # layer -> each expert's share of the mean load, last seen
    events: list[dict[str, Any]] = field(default_factory=list)  # each with a kind and a time, in order
    progress: dict[str, Any] = field(default_factory=dict)  # as in runfolder.Progress, finite numbers and texts only
    memory: dict[str, Any] = field(default_factory=dict)  # as written by train/measuring.py
    failures: list[tuple[str, list[str]]] = field(default_factory=list)  # (file, lines) of the agent's reports, newest first
    checkpoints: list[int] = field(default_factory=list)  # steps of the complete ones, rising
    finished: bool = False
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    def column(self, name: str) -> Points:
        return self.columns.get(name, [])

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        points = self.column(name)
        return points[-1][1] if points else None

    @property
    def step(self) -> int:
        """The newest one known of."""
        return int(max(self.progress.get("step", 0), max((points[-1][0] for points in self.columns.values()), default=0)))

    @property
    def steps(self) -> int:
        """The last one; 0 if it is not known."""
        return int(number(self.config.get("train.steps")) or self.progress.get("steps") or 0)

    @property
    def tokens_per_step(self) -> float:
        """0 if it is not known."""
        batch, length = number(self.config.get("train.global_batch_size")), number(self.config.get("data.seq_length"))
        return (batch or 0) * (length or 0)


def find_run(folder: Path, key: str) -> Path:
    """The folder if a run has written to it. Raises ConfigError. `key`: the setting that names it."""
    if folder.is_dir() and any((folder / name).is_file() for name in _SIGNS):
        return folder
    rule = "no run has written there" if folder.is_dir() else "no such folder"
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))[:3] if folder.is_dir() else []
    fix = f"{key}={inside[0]}" if inside else "megalm pretrain train.run_dir=..."
    allowed = f"a folder with {', '.join(_SIGNS[:-1])} or {_SIGNS[-1]}"
    raise ConfigError(Problem(key, folder, rule, allowed, fix))


def read_run(folder: Path, metrics: bool = True) -> Run:
    """All that the folder says; without `metrics` what is quick to read. Raises nothing for what is missing or damaged."""
    run = Run(folder)
    run.config = _read_config(_own(run, CONFIG), run.notes)
    run.progress = _checked(read_object(_own(run, PROGRESS), run.notes) or {})
    run.finished = (folder / FINISHED).is_file()
    run.events = list(deque(_timed(read_lines(_own(run, EVENTS), run.notes)), _EVENTS))
    run.checkpoints = _find_checkpoints(folder / "checkpoints")
    run.failures = list(_read_failures(run))
    if metrics:
        if not (folder / METRICS).is_file():
            run.notes.append(f"{METRICS} is not there: no curves")
        run.columns, run.loads = _read_metrics(_own(run, METRICS), run.notes)
        run.memory = read_object(_own(run, MEMORY), run.notes) or {}
    return run


def _own(run: Run, name: str) -> Path:
    """The path of a file of the run. One that leads out of the folder counts as missing, as os.devnull, which is no file, does:

    a link to somebody's settings or keys must not end up on a page that is passed on.
    """
    path = run.folder / name
    if path.resolve().is_relative_to(run.folder.resolve()):
        return path
    run.notes.append(f"{name} leads out of the run's folder, and was not read")
    return Path(os.devnull)


def _read_failures(run: Run) -> Iterator[tuple[str, list[str]]]:
    """What the agents wrote when ranks died or hung: the state and the last collective of every rank."""
    found = islice((path for form in _REPORTS for path in run.folder.glob(form)), 1000)
    names = sorted((str(path.relative_to(run.folder)) for path in found if path.is_file()), key=_age(run.folder))
    for name in names[:_FAILURES]:
        path = _own(run, name)
        if path.is_file():
            with suppress(OSError), open(path, "rb") as file:
                yield name, file.read(_FAILURE_BYTES).decode("utf-8", errors="replace").splitlines()


def _age(folder: Path) -> Callable[[str], float]:
    """A sorting key: the newest file first."""
    return lambda name: -(folder / name).lstat().st_mtime


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"more than {_CONFIG_BYTES >> 20} MiB")
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {type(error).__name__}")
        return {}
    return dict(islice(_leaves("", content, 0), _LEAVES)) if isinstance(content, dict) else {}


def _leaves(prefix: str, node: dict, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value and depth < _DEPTH:
            yield from _leaves(f"{prefix}{key}.", value, depth + 1)
        else:
            yield f"{prefix}{key}", value


def _checked(progress: dict[str, Any]) -> dict[str, Any]:
    """Its numbers, and the attempt's label."""
    found: dict[str, Any] = {key: value for key, text in progress.items() if (value := number(text)) is not None}
    return found | {"attempt": str(progress.get("attempt", ""))[:40]} if found else {}


def _timed(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those with a kind and a time."""
    for event in events:
        time = number(event.get("time"))
        if time is not None and isinstance(event.get("kind"), str):
            yield event | {"time": time}


def _find_checkpoints(folder: Path) -> list[int]:
    """A checkpoint gets its name when it is complete; one that is being written has another."""
    try:
        names = [entry.name for entry in islice(folder.iterdir(), 10_000)]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, Points], dict[str, list[float]]]:
    columns: dict[str, dict[float, float]] = {}
    layers: Any = {}
    for record in read_lines(path, notes):
        step = number(record.get("step"))
        if step is None:
            continue
        for key, text in islice(record.items(), 64):
            value = number(text)
            if value is not None and key != "step":
                columns.setdefault(key, {})[step] = value
        layers = record.get("moe_layers") or layers
    curves = {key: sorted(values.items()) for key, values in islice(columns.items(), 256)}
    return curves, _read_loads(layers if isinstance(layers, dict) else {})


def _read_loads(layers: dict[str, Any]) -> dict[str, list[float]]:
    found = {}
    for layer, row in islice(layers.items(), 512):
        loads = row.get("load") if isinstance(row, dict) else None
        if isinstance(loads, list) and loads:
            found[str(layer)[:12]] = [max(0.0, number(load) or 0.0) for load in loads[:4096]]
    return found
