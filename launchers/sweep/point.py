"""A point of a sweep: one choice of settings, its folder, and what came of it.

SWEEP_DIR/N is the run folder of point N, or a link to it where the user has named train.run_dir. A point is known by its
settings and not by its number: a sweep that is started again with more values finds the points that it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from megalm.config.fields import flatten, override
from megalm.config.load import examine
from megalm.config.run import ROOTS, RunConfig
from megalm.errors import ConfigError, MegalmError, Problem, RunError, writing
from megalm.runfolder import POINT, Result, read_result, replace_file

Judge = Callable[[type[Any], dict[str, Any]], tuple[Any, list[Problem]]]
CONFIG = "config.yaml"
# Settings of where and how a point runs: they do not make it another one.
_ELSEWHERE = ("slurm.", "cluster.", "tracking.", "train.run_dir", "checkpoint.keep", "checkpoint.save_every")


@dataclass
class Point:
    """`status`: waiting, running, submitted, finished, pruned, stopped, failed."""

    number: int
    overrides: list[str]
    folder: Path  # of the run, absolute
    arguments: list[str]  # of the verb
    config: RunConfig
    place: Path  # SWEEP_DIR/N: the folder, or a link to it
    status: str = "waiting"
    note: str = ""  # a word about the status
    error: MegalmError | None = None
    before: bool = False  # was finished when the sweep began

    def result(self) -> Result | None:
        """None while it has none."""
        return read_result(self.folder)


@dataclass
class SweepCommand:
    """What a launcher needs to know of the command line; the task that Hydra gets has one as `sweep`."""

    verb: str
    options: list[str] = field(default_factory=list)  # files and flags, without -m
    failures: list[MegalmError] = field(default_factory=list)
    inspected: dict[frozenset[str], Any] = field(default_factory=dict)  # of compose.Command: composing again takes 60 ms


def files_and_flags(typed: Sequence[str]) -> list[str]:
    """The arguments that are not key=value."""
    return [text for text in typed if text.startswith("--") or not {"=", "~"} & set(text)]


def identity(config: RunConfig) -> str:
    """What makes a point the one that it is: its settings, wherever they came from; 16 hex digits."""
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(_ELSEWHERE)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def plan_points(
    context: Any, config: Any, task: Any, job_overrides: Sequence[Sequence[str]], judge: Judge = examine
) -> list[Point]:
    """The points in order, each with a folder that says whose it is. Equal ones are one and the same object.

    judge: as of compose.inspect. Raises ConfigError before anything is written.
    """
    from hydra.core.utils import setup_globals

    setup_globals()
    sweep: SweepCommand = task.sweep
    typed = [_compose(context, config, sweep, overrides, judge) for overrides in job_overrides]
    root = Path(str(config.hydra.sweep.dir)).absolute()
    known = {entry["settings"]: int(number) for number, entry in read_points(root)}
    made: dict[str, Point] = {}
    points = []
    with writing(root, "hydra.sweep.dir"):
        root.mkdir(parents=True, exist_ok=True)
        for overrides, run in zip(job_overrides, typed, strict=True):
            key = identity(run)
            if key not in made:
                place = root / str(known[key] if key in known else _free(root))
                made[key] = _open(place, list(overrides), run, sweep, key)
            points.append(made[key])
    return points


def read_points(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """(number, what its point.json holds) of every point of a sweep, in order."""
    found = []
    for path in root.glob(f"*/{POINT}"):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if path.parent.name.isdigit() and isinstance(entry["overrides"], list) and entry["settings"]:
                found.append((path.parent.name, entry))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written by a sweep that was killed: its number is taken, its point is not
    return sorted(found, key=lambda item: int(item[0]))


def _compose(context: Any, config: Any, sweep: SweepCommand, overrides: Sequence[str], judge: Judge) -> RunConfig:
    from megalm.launchers.compose import plain, task_words

    words = task_words(overrides)
    known = sweep.inspected.pop(words, None)  # once: whoever gets it changes it
    if known is not None and len({text.partition("=")[0] for text in words}) == len(words):  # else their order matters
        return cast(RunConfig, known)
    raw, unresolved = plain(context.config_loader.load_sweep_config(config, list(overrides)))
    run: RunConfig
    run, problems = judge(ROOTS[sweep.verb], raw)
    if unresolved + problems:
        raise ConfigError(*unresolved, *problems)
    return run


def _free(root: Path) -> int:
    taken = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
    return max(taken, default=-1) + 1


def _open(place: Path, overrides: list[str], run: RunConfig, sweep: SweepCommand, key: str) -> Point:
    """Makes the point's folder, and writes there whose it is."""
    folder = place
    if run.train.run_dir != RunConfig().train.run_dir:
        folder = Path(run.train.run_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(folder)
    folder.mkdir(exist_ok=True)
    run.train.run_dir = str(folder)
    plain = [text for text in overrides if not text.startswith(("train.run_dir=", "hydra.", "hydra/"))]
    arguments = [*sweep.options, *plain, override("train.run_dir", str(folder))]
    point = Point(int(place.name), overrides, folder, arguments, run, place)
    told = {"settings": key, "overrides": overrides, "verb": sweep.verb, "arguments": arguments, "directory": os.getcwd()}
    replace_file(folder / POINT, json.dumps(told) + "\n")
    if not (folder / CONFIG).exists():  # the run writes its own when it begins
        replace_file(folder / CONFIG, yaml.safe_dump(asdict(run), sort_keys=False))
    result = point.result()
    if result is not None:
        point.status, point.before = result.status, True
    return point


def returns(points: Sequence[Point], task: Any) -> list[Any]:
    """What Hydra's sweepers get of each point: its value, None where it has none. Failures go to the task's list."""
    from hydra.core.utils import JobReturn, JobStatus

    made = []
    for point in points:
        result = point.result()
        done = JobReturn(overrides=list(point.overrides), working_dir=str(point.folder), task_name=str(point.number))
        done.status, done._return_value = JobStatus.COMPLETED, result.value if result is not None else None
        made.append(done)
    errors = [point.error for point in unique(points) if point.error]
    task.sweep.failures += errors
    for error in errors:
        print(error, file=sys.stderr, flush=True)
    return made


def unique(points: Sequence[Point]) -> list[Point]:
    """Each point once."""
    return list({point.number: point for point in points}.values())


def failure(point: Point, said: str, code: int) -> RunError:
    """The error of a point that has ended badly; its exit code is the one of the whole sweep."""
    fix = f"see {point.folder}: console.log, or logs/; the same sweep tries it again"
    error = RunError(Problem(f"point {point.number}", " ".join(point.overrides), said, "", fix))
    error.exit_code = code
    return error
