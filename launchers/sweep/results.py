"""What the points of a sweep have in common, in what they differ, and what came of each; read from their folders."""

from __future__ import annotations

import math
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megalm.errors import ConfigError, Problem
from megalm.launchers.sweep.point import read_points
from megalm.observe.folder import read_run
from megalm.observe.verdict import is_alive, judge
from megalm.runfolder import read_result

FOLD = "data.fold"


@dataclass(frozen=True)
class Row:
    """A point, or several that differ in data.fold alone. `values`: {swept key: as typed}."""

    name: str
    values: dict[str, str]
    loss: float | None
    step: int
    status: str
    command: str
    spread: float | None = None  # sample standard deviation over the folds
    folds: int = 0


@dataclass(frozen=True)
class SweepResults:
    """`rows`: best first, those without a loss last. `groups`: the same over the folds, empty where there are none."""

    folder: Path
    keys: list[str]
    rows: list[Row]
    groups: list[Row]
    metric: str

    @property
    def best(self) -> Row | None:
        """Of the finished ones: a pruned point was not worth going on with."""
        return next((row for row in self.groups or self.rows if _is_done(row)), None)


def read_sweep(folder: Path) -> SweepResults:
    """Raises ConfigError if no sweep has written to this folder."""
    points = read_points(folder)
    if not points:
        rule = "no point of a sweep is there"
        fix = "megalm pretrain -m optim.lr=1e-3,3e-4 hydra.sweep.dir=runs/lr, and then megalm sweep report runs/lr"
        raise ConfigError(Problem("sweep.folder", folder, rule, "", fix))
    settings = [_settings(entry) for _, entry in points]
    names = list(dict.fromkeys(key for own in settings for key in own))
    keys = [key for key in names if len({own.get(key, "") for own in settings}) > 1 and key != "train.run_dir"]
    rows, metrics = [], []
    for (number, entry), own in zip(points, settings, strict=True):
        values = {key: own.get(key, "as by default") for key in keys}
        row, metric = _row(folder / number, number, values, _command(entry, ()))
        rows.append(row)
        metrics += [metric] if metric else []
    groups = _over_folds(rows, [_command(entry, (FOLD,)) for _, entry in points]) if FOLD in keys else []
    return SweepResults(folder, keys, _best_first(rows), _best_first(groups), metrics[0] if metrics else "loss")


def _is_done(row: Row) -> bool:
    return row.loss is not None and math.isfinite(row.loss) and row.status == "finished"


def _settings(entry: dict[str, Any]) -> dict[str, str]:
    pairs = (str(text).partition("=") for text in entry["overrides"])
    return {key: value for key, equals, value in pairs if equals}


def _row(place: Path, number: str, values: dict[str, str], command: str) -> tuple[Row, str]:
    result = read_result(place)
    if result is not None:
        return Row(number, values, result.value, result.step, result.status, command), result.metric
    run = read_run(place, metrics=False)
    state = judge(run, time.time(), is_alive(run)).state if run.events or run.progress else "not begun"
    return Row(number, values, None, run.step, state, command), ""


def _command(entry: dict[str, Any], without: tuple[str, ...]) -> str:
    """What runs a point once more, in a folder of its own."""
    left_out = tuple(f"{key}=" for key in ("train.run_dir", *without))
    words = [str(text) for text in entry.get("arguments", []) if not str(text).startswith(left_out)]
    command = f"megalm {shlex.join([str(entry.get('verb', 'pretrain')), *words, 'train.run_dir=runs/best'])}"
    begun = str(entry.get("directory", ""))  # paths among the words are relative to it
    return f"cd {shlex.quote(begun)} && {command}" if begun and begun != os.getcwd() else command


def _over_folds(rows: list[Row], commands: list[str]) -> list[Row]:
    """Mean and spread of the points that differ in their fold alone."""
    alike: dict[tuple[tuple[str, str], ...], list[tuple[Row, str]]] = {}
    for row, command in zip(rows, commands, strict=True):
        alike.setdefault(tuple(item for item in row.values.items() if item[0] != FOLD), []).append((row, command))
    groups = []
    for values, members in alike.items():
        losses = [row.loss for row, _ in members if row.loss is not None and row.status == "finished"]
        status = "finished" if len(losses) == len(members) else f"{len(losses)} of {len(members)} finished"
        name = ", ".join(row.name for row, _ in members)
        mean, spread = fmean(losses) if losses else None, stdev(losses) if len(losses) > 1 else None
        step = min(row.step for row, _ in members)
        groups.append(Row(name, dict(values), mean, step, status, members[0][1], spread, len(losses)))
    return groups


def _best_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.loss if row.loss is not None and math.isfinite(row.loss) else math.inf)
